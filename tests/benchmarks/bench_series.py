"""Benchmark 6: the whole series from an empty store, as ``lowrank run`` does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from harness import interleave, seconds, verdict
from pytest_benchmark.fixture import BenchmarkFixture

LOWRANK = [sys.executable, "-m", "lowrank_helpers"]


def test_series(benchmark: BenchmarkFixture, mnist_dir: Path, tmp_path: Path) -> None:
    benchmark.group = "6. The series"
    environment = os.environ | {"LOWRANK_DATA_DIR": str(mnist_dir)}
    command = [*LOWRANK, "run", "-o", str(tmp_path)]

    def series() -> float:
        return seconds(lambda: subprocess.run(command, env=environment, check=True), torch.device("cpu"))

    (together,) = interleave(benchmark, {"series": series}, rounds=1)["series"]
    notebooks = json.loads((tmp_path / "results.json").read_text())["notebooks"]
    benchmark.extra_info["rows"] = [
        {"notebook": name, "time (s)": notebook["seconds"]} for name, notebook in notebooks.items()
    ] + [{"notebook": "the command as a whole", "time (s)": together}]
    benchmark.extra_info["targets"] = [
        verdict("(6) the whole series from an empty store within 200 s", f"{together:.0f} s", together <= 200)
    ]
