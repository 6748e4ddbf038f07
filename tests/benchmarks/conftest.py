"""What benchmarks are given, and the page that they leave: beside the JSON, and on the screen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from table import markdown

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
    machine_info |= {
        "torch": torch.__version__,
        "precision": pick_precision("auto", pick_device()),
        "threads": torch.get_num_threads(),
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    page = markdown(output_json)
    Path(config.option.benchmark_json).with_suffix(".md").write_text(page)
    config.get_terminal_writer().write(f"\n\n{page}\n")
