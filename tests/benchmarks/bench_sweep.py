"""Benchmark 7: a sweep by two workers on two cores against one."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dask.system import CPU_COUNT
from harness import interleave, seconds, verdict
from pytest_benchmark.fixture import BenchmarkFixture

LOWRANK = [sys.executable, "-m", "lowrank_helpers"]
N_POINTS = 6
AT_MOST = 0.6  # of one worker's time


def command_seconds(command: list[str], environment: dict[str, str]) -> float:
    return seconds(lambda: subprocess.run(command, env=environment, check=True), torch.device("cpu"))


@pytest.mark.skipif(CPU_COUNT < 2, reason="two workers need two cores")
def test_sweep_scales(benchmark: BenchmarkFixture, mnist_dir: Path, tmp_path: Path) -> None:
    benchmark.group = "7. Sweeps"
    environment = os.environ | {"LOWRANK_DATA_DIR": str(mnist_dir)}
    sweep = [*LOWRANK, "sweep", "02_train", "-g", f"seed=0..{N_POINTS - 1}"]
    by_workers = {  # as many cores as workers: a kernel of one worker alone would take both
        n: partial(
            command_seconds,
            ["taskset", "-c", f"0-{n - 1}", *sweep, "--workers", str(n), "-o", str(tmp_path / str(n))],
            environment,
        )
        for n in (1, 2)
    }
    took = {n: result[0] for n, result in interleave(benchmark, by_workers, rounds=1).items()}
    benchmark.extra_info["rows"] = [{"workers": n, "points": N_POINTS, "time (s)": time} for n, time in took.items()]
    benchmark.extra_info["targets"] = [
        verdict(
            f"(7) two workers on two cores in at most {AT_MOST} of one worker's time",
            f"{took[2] / took[1]:.2f}",
            took[2] <= AT_MOST * took[1],
        )
    ]
