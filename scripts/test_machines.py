"""Check the recorded notebooks under what other machines do: ``make test-machines``, or some variants by name.

Each variant is one whole ``lowrank check``, which takes minutes. The result of each, with revision and processor, goes
into docs/machines.md; a variant that was not run this time keeps its line, and one that was run with other notebooks
than all keeps its other lines.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from lowrank_helpers.data import PROJECT
from lowrank_helpers.series.results import software

PAGE = PROJECT / "docs" / "machines.md"
HEAD = """# The recorded outputs on other machines

The last result of each variant of `make test-machines`, of all notebooks or of some: `lowrank check` under other
arithmetic, starts and numbers of workers. A start is *moved* where every weight begins one unit in the last place
beside its recorded start, after which a training goes its own way as it does on another processor.

| variant | notebooks | result | revision | processor | minutes |
|---|---|---|---|---|---|
"""
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as-recorded": ([], {}),
    "float32": (["-p", "precision", "float32"], {}),
    "no-amx": ([], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "no-bfloat16": ([], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "compatible-products": ([], {"MKL_CBWR": "COMPATIBLE"}),
    "one-worker": ([], {"OMP_NUM_THREADS": "1"}),
    "four-workers": ([], {"OMP_NUM_THREADS": "4"}),
} | {f"moved-start-{seed}": ([], {"LOWRANK_MOVED_STARTS": str(seed)}) for seed in range(1, 11)}


def check(variant: str, notebooks: Sequence[str], revision: str) -> tuple[bool, str]:
    """Run one variant of all notebooks or of some; return whether it passed, and its line of the table."""
    arguments, environment = VARIANTS[variant]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_helpers", "check", *notebooks, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    minutes = (time.perf_counter() - start) / 60
    if done.returncode:
        click.echo(done.stdout + done.stderr)
    counts = re.findall(r"^=+ (.*(?:passed|failed).*) in .* =+$", done.stdout, re.MULTILINE) or ["no cell ran"]
    cells = [variant, ", ".join(notebooks) or "all", counts[-1], revision, _processor(), f"{minutes:.1f}"]
    return not done.returncode, f"| {' | '.join(cells)} |"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _key(line: str) -> tuple[str, ...]:
    """Return the variant and the notebooks of a line of the page."""
    return tuple(cell.strip() for cell in line.split("|")[1:3])


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(list(VARIANTS)), metavar="[VARIANT]...")
@click.option("-n", "--notebook", "notebooks", multiple=True, help="Check this one, and others named so; without, all.")
def main(variants: tuple[str, ...], notebooks: tuple[str, ...]) -> None:
    """Check the recorded notebooks under the VARIANTS named, or under all of them."""
    text = PAGE.read_text() if PAGE.exists() else ""
    known = tuple(f"| {variant} |" for variant in VARIANTS)
    lines = {_key(line): line for line in text.splitlines() if line.startswith(known)}
    failed = []
    revision = software()["revision"]  # before the page is written, which would make it dirty
    for variant in variants or VARIANTS:
        passed, line = check(variant, notebooks, revision)
        if not notebooks:  # all of them say more than some of them once did
            lines = {key: older for key, older in lines.items() if key[0] != variant}
        lines[_key(line)] = line
        click.echo(line)
        failed += [] if passed else [variant]
        in_order = sorted(lines, key=lambda key: (list(VARIANTS).index(key[0]), key))
        PAGE.write_text(HEAD + "\n".join(lines[key] for key in in_order) + "\n")
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
