"""What benchmarks are given, and the page of tables that they leave: beside the JSON, and on the screen."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lowrank_helpers import data
from lowrank_helpers.training import pick_device, pick_precision


@pytest.fixture(scope="session")
def device() -> torch.device:
    return pick_device()


@pytest.fixture(scope="session")
def precision(device: torch.device) -> str:
    """What ``auto`` stands for here."""
    return pick_precision("auto", device)


@pytest.fixture(scope="session")
def images(mnist_dir: Path, device: torch.device) -> data.Dataset:
    return data.load("mnist", mnist_dir).to(device)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= {"torch": torch.__version__, "precision": pick_precision("auto", pick_device())}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    page = _page(output_json)
    Path(config.option.benchmark_json).with_suffix(".md").write_text(page)
    config.get_terminal_writer().write(f"\n\n{page}\n")


def _page(saved: dict[str, Any]) -> str:
    """Return the machine, the targets, and a table for each group, of the ``extra_info`` of its benchmarks."""
    targets: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, Any]]] = {"Targets": targets}
    for benchmark in sorted(saved["benchmarks"], key=lambda benchmark: benchmark["group"]):
        groups.setdefault(benchmark["group"], []).extend(benchmark["extra_info"]["rows"])
        targets += benchmark["extra_info"].get("targets", [])
    machine, commit = saved["machine_info"], saved["commit_info"]
    about = (
        f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores · PyTorch {machine['torch']} · "
        f"precision `auto` is {machine['precision']} · {saved['datetime'][:10]} · revision {commit['id'][:7]}"
        f"{' with changes' if commit['dirty'] else ''}"
    )
    tables = [f"## {group}\n\n{_table(rows)}" for group, rows in groups.items()]
    return "\n\n".join(["# Benchmarks", about, *tables]) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    table = pd.DataFrame(rows, dtype=object).fillna("")
    return f"```\n{table.to_string(index=False, float_format='{:,.4g}'.format)}\n```"
