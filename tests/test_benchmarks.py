"""The benchmarks' own machinery: a real run of a small one, and how a time to an accuracy is told."""

import json
import os
import subprocess
import sys

from benchmarks.harness import Reached

from lowrank_helpers import PROJECT
from lowrank_helpers.training import History

BENCHMARK = """
from harness import interleave, medians

def test_two(benchmark):
    benchmark.group = "2. Races"
    turns = []
    contestants = {name: lambda name=name: turns.append(name) or 1500.0 * len(turns) for name in ("tortoise", "hare")}
    times = medians(interleave(benchmark, contestants, rounds=3))
    benchmark.extra_info["rows"] = [{"who": who, "time (s)": time} for who, time in times.items()]
    benchmark.extra_info["targets"] = [
        {"target": "(2) tortoise", "measured": "7500 s", "met": times["tortoise"] <= 1},
        {"target": "(2) hare", "measured": "6000 s", "met": times["hare"] <= 6000},
    ]

def test_one(benchmark):
    benchmark.group = "1. Memory"
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["rows"] = [{"bytes": 12_345_678}, {"bytes": 3, "share (%)": 0.123456}]
"""


def test_a_run_saves_its_tables_and_a_missed_target_fails_nothing(tmp_path):
    (tmp_path / "bench_small.py").write_text(BENCHMARK)
    saved = tmp_path / "benchmarks.json"
    pytest = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", os.devnull, "--rootdir", tmp_path]
    done = subprocess.run(
        [*pytest, "--benchmark-json", saved, tmp_path / "bench_small.py"],
        env=os.environ | {"PYTHONPATH": str(PROJECT / "tests" / "benchmarks")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = saved.with_suffix(".md").read_text()
    assert page in done.stdout
    targets, memory, races = page.split("\n## ")[1:]
    assert "| (2) tortoise | 7500 s | ✗ |" in targets and "| (2) hare | 6000 s | ✓ |" in targets
    assert memory.endswith("| bytes | share (%) |\n| --- | --- |\n| 12,345,678 |  |\n| 3 | 0.123 |\n")
    assert races.endswith("| tortoise | 4,500 |\n| hare | 6,000 |\n")
    # The contestants took turns: what one returned lies between two results of the other.
    (results,) = [
        benchmark["extra_info"]["results"]
        for benchmark in json.loads(saved.read_bytes())["benchmarks"]
        if benchmark["group"] == "2. Races"
    ]
    assert results == {"tortoise": [1500, 4500, 7500], "hare": [3000, 6000, 9000]}


def test_the_time_to_an_accuracy_ends_with_the_first_epoch_that_reaches_it():
    history = History(accuracy={"test": [0.1, 0.94, 0.96, 0.95]}, seconds=[0.0, 2.0, 4.0, 6.0], evaluation_seconds=3.0)
    assert Reached.of(history, "test", 0.95) == Reached(4.0, 6.0, 2, 0.96, True)


def test_an_accuracy_that_was_not_reached_is_told_as_a_bound():
    history = History(accuracy={"test": [0.1, 0.94]}, seconds=[0.0, 2.0], evaluation_seconds=3.0)
    reached = Reached.of(history, "test", 0.95)
    assert reached == Reached(2.0, 5.0, 1, 0.94, False)
    assert reached.row()["training (s)"] == "> 2.00"
