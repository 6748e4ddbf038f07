"""Benchmarks 3 and 4: the whole series from an empty store, and a sweep by two workers against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from harness import medians, seconds, verdict
from pytest_benchmark.fixture import BenchmarkFixture

LOWRANK = [sys.executable, "-m", "lowrank_helpers"]
N_POINTS = 6


def command_seconds(command: list[str], mnist_dir: Path) -> float:
    environment = os.environ | {"LOWRANK_DATA_DIR": str(mnist_dir)}
    return seconds(lambda: subprocess.run(command, env=environment, check=True), torch.device("cpu"))


def test_series(benchmark: BenchmarkFixture, mnist_dir: Path, tmp_path: Path) -> None:
    benchmark.group = "3. The series"
    run = {"series": lambda: command_seconds([*LOWRANK, "run", "-o", str(tmp_path)], mnist_dir)}
    together = medians(benchmark, run, rounds=1)["series"]
    notebooks = json.loads((tmp_path / "results.json").read_text())["notebooks"]
    kinds = pd.DataFrame({name: notebook["seconds_by_kind"] for name, notebook in notebooks.items()}).T
    kinds.loc["the command as a whole"] = kinds.sum()
    table = kinds.fillna(0).add_suffix(" (processor s)").rename_axis("notebook")
    table.insert(0, "time (s)", [*(notebook["seconds"] for notebook in notebooks.values()), together])
    benchmark.extra_info["rows"] = table.reset_index().to_dict("records")
    busy = kinds.iloc[-1].sum() / ((os.cpu_count() or 1) * together)
    benchmark.extra_info["targets"] = [
        verdict("(3) the whole series from an empty store within 300 s", f"{together:.0f} s", together <= 300),
        verdict("(3) notebooks keep the cores busy for ≥ 87 % of that", f"{busy:.0%}", busy >= 0.87),
    ]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_sweep_scales(benchmark: BenchmarkFixture, mnist_dir: Path, tmp_path: Path) -> None:
    benchmark.group = "4. Sweeps"

    def sweep(workers: int) -> float:
        cores = ["taskset", "-c", f"0-{workers - 1}"]  # as many as workers: a kernel of one alone would take both
        grid = ["-g", f"seed=0..{N_POINTS - 1}", "--workers", str(workers)]
        return command_seconds([*cores, *LOWRANK, "sweep", "02_train", *grid, "-o", f"{tmp_path}/{workers}"], mnist_dir)

    took = medians(benchmark, {1: lambda: sweep(1), 2: lambda: sweep(2)}, rounds=1)
    benchmark.extra_info["rows"] = [{"workers": n, "points": N_POINTS, "time (s)": time} for n, time in took.items()]
    share = took[2] / took[1]
    target = "(4) two workers on two cores in at most 0.6 of one worker's time"
    benchmark.extra_info["targets"] = [verdict(target, f"{share:.2f}", share <= 0.6)]
