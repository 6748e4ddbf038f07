"""Check the recorded notebooks under what other machines do: ``make test-machines``, or some variants by name.

Each variant is one whole ``lowrank check``, which takes minutes, from a seed that the evidence has not seen: another
machine is another seed. The last result of each, with revision and processor, stands in docs/machines.md.
"""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import click

from lowrank_helpers import PROJECT
from lowrank_helpers.series.results import software

PAGE = PROJECT / "docs" / "machines.md"
HEAD = """# The recorded outputs on other machines

The last result of each variant of `make test-machines`: `lowrank check` of all notebooks, from a seed that the evidence
has not seen, under other arithmetic and numbers of workers.

| variant | result | revision | processor | minutes |
|---|---|---|---|---|
"""
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "another-seed": (["-p", "seed", "101"], {}),
    "float32": (["-p", "seed", "102", "-p", "precision", "float32"], {}),
    "no-amx": (["-p", "seed", "103"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "no-bfloat16": (["-p", "seed", "104"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "one-worker": (["-p", "seed", "105"], {"OMP_NUM_THREADS": "1"}),
    "four-workers": (["-p", "seed", "106"], {"OMP_NUM_THREADS": "4"}),
}


def check(variant: str) -> tuple[bool, str]:
    """Run one variant; return whether it passed, and its line of the table."""
    arguments, environment = VARIANTS[variant]
    start = time.perf_counter()
    command = [sys.executable, "-m", "lowrank_helpers", "check", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    minutes = (time.perf_counter() - start) / 60
    if done.returncode:
        click.echo(done.stdout + done.stderr)
    counts = re.findall(r"^=+ (.*(?:passed|failed).*) in .* =+$", done.stdout, re.MULTILINE) or ["no cell ran"]
    return (
        not done.returncode,
        f"| {variant} | {counts[-1]} | {software()['revision']} | {_processor()} | {minutes:.1f} |",
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(list(VARIANTS)), metavar="[VARIANT]...")
def main(variants: tuple[str, ...]) -> None:
    """Check the recorded notebooks under the VARIANTS named, or under all of them."""
    software()  # its answer is kept: the page, once written, would make the revision dirty
    lines = {line.split(" | ")[0].strip("| "): line for line in PAGE.read_text().splitlines() if line.startswith("| ")}
    failed = []
    for variant in variants or VARIANTS:
        passed, lines[variant] = check(variant)
        click.echo(lines[variant])
        failed += [] if passed else [variant]
        PAGE.write_text(HEAD + "".join(f"{lines[name]}\n" for name in VARIANTS if name in lines))
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
