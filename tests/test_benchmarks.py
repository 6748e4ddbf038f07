"""The benchmarks' own machinery: a real run of a small one."""

import json
import os
import re
import subprocess
import sys

from lowrank_helpers import PROJECT

BENCHMARK = """
from harness import medians

def test_two(benchmark):
    benchmark.group = "2. Races"
    turns = []
    contestants = {name: lambda name=name: turns.append(name) or 1500.0 * len(turns) for name in ("tortoise", "hare")}
    times = medians(benchmark, contestants, rounds=3)
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
    assert re.search(r"tortoise +7500 s +False\n.*hare +6000 s +True\n", targets)
    assert re.search(r"bytes +share \(%\)\n *12345678 *\n *3 +0.1235\n", memory)
    assert re.search(r"tortoise +4,500\n +hare +6,000\n", races)
    # The contestants took turns: what one returned lies between two results of the other.
    (results,) = [
        benchmark["extra_info"]["results"]
        for benchmark in json.loads(saved.read_bytes())["benchmarks"]
        if benchmark["group"] == "2. Races"
    ]
    assert results == {"tortoise": [1500, 4500, 7500], "hare": [3000, 6000, 9000]}
