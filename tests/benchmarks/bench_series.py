"""Benchmark 6: the whole series from an empty store, as ``lowrank run`` does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
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
    kinds = pd.DataFrame({name: notebook["seconds_by_kind"] for name, notebook in notebooks.items()}).T
    kinds.loc["the command as a whole"] = kinds.sum()
    table = kinds.fillna(0).add_suffix(" (processor s)").rename_axis("notebook")
    table.insert(0, "time (s)", [*(notebook["seconds"] for notebook in notebooks.values()), together])
    benchmark.extra_info["rows"] = table.reset_index().to_dict("records")
    processor, evaluating = kinds.iloc[-1].sum(), kinds.iloc[-1]["evaluating"]
    busy = processor / ((os.cpu_count() or 1) * together)
    benchmark.extra_info["targets"] = [
        verdict("(6) the whole series from an empty store within 300 s", f"{together:.0f} s", together <= 300),
        verdict("(6) notebooks keep the cores busy for ≥ 87 % of that", f"{busy:.0%}", busy >= 0.87),
        verdict("(6) evaluation takes ≤ 12 % of the notebooks' processor time", f"{evaluating / processor:.0%}",
                evaluating <= 0.12 * processor),
    ]  # fmt: skip
