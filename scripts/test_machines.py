"""Check the recorded notebooks under what other machines do: ``make test-machines``, or some variants by name.

Each variant is one whole ``lowrank check``, which takes minutes, from a seed that the evidence has not seen: another
machine is another seed.
"""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import click

VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "another-seed": (["-p", "seed", "101"], {}),
    "float32": (["-p", "seed", "102", "-p", "precision", "float32"], {}),
    "no-amx": (["-p", "seed", "103"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "no-bfloat16": (["-p", "seed", "104"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "one-worker": (["-p", "seed", "105"], {"OMP_NUM_THREADS": "1"}),
    "four-workers": (["-p", "seed", "106"], {"OMP_NUM_THREADS": "4"}),
}


def check(variant: str) -> tuple[bool, str]:
    """Run one variant; return whether it passed, and a line that says so."""
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
        f"{variant}: {counts[-1]} in {minutes:.1f} minutes on {_processor()}",
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(list(VARIANTS)), metavar="[VARIANT]...")
def main(variants: tuple[str, ...]) -> None:
    """Check the recorded notebooks under the VARIANTS named, or under all of them."""
    failed = []
    for variant in variants or VARIANTS:
        passed, line = check(variant)
        click.echo(line)
        failed += [] if passed else [variant]
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
