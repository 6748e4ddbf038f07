"""What tests share: the datasets, an environment that each test leaves as it was, and reproducible properties."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lowrank_helpers import PROJECT, data
from lowrank_helpers.series.settings import unchanged_environment

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("reproducible")
SECONDS, SECONDS_IF_SLOW = 300, 900  # far above what the longest test of its kind takes on a busy machine

torch.set_num_threads(1)  # the matrices here are small; threads that wait for each other cost more than they bring


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let no test wait for good: after its time all stacks are printed and the run ends.

    Here and not in pyproject.toml, where it would hold for the cells of notebooks under nbval too. By a thread, since a
    signal is not heard by a program that stands still in foreign code.
    """
    for item in items:
        seconds = SECONDS_IF_SLOW if item.get_closest_marker("slow") else SECONDS
        item.add_marker(pytest.mark.timeout(seconds, method="thread"))


@pytest.fixture(autouse=True)
def environment_kept():
    """Undo what a run sets for its kernels."""
    with unchanged_environment():
        yield


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder with MNIST, where this machine has one."""
    for folder in (os.environ.get("LOWRANK_DATA_DIR"), PROJECT / "data"):
        if folder and (Path(folder) / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
            return Path(folder).resolve()
    pytest.skip("MNIST is not on this machine: set LOWRANK_DATA_DIR")


@pytest.fixture(scope="session")
def small_report(tmp_path_factory) -> Path:
    """A run folder of two small notebooks with their pages; the second one failed."""
    from small_series import run_and_render  # here: rendering takes seconds to import

    folder = tmp_path_factory.mktemp("series")
    run_and_render(folder / "notebooks", folder / "run")
    return folder / "run"
