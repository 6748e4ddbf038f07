"""What passes between processes in the environment: written and read in one place, and gone when its time is over."""

import os
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from lowrank_helpers import PROJECT
from lowrank_helpers.series import execution, sweep
from lowrank_helpers.series.settings import Settings, unchanged_environment

TOLD = Settings(Path("/run"), Path("/networks"), Path("/data"), Path("/started"), "digits")


@pytest.fixture(autouse=True)
def told_nothing(monkeypatch):
    for field in fields(Settings):
        monkeypatch.delenv(f"LOWRANK_{field.name.upper()}", raising=False)


@pytest.mark.parametrize("settings", [TOLD, Settings(), Settings(started_in=Path("/x"))])
def test_what_one_process_is_told_another_reads_and_no_trace_is_left(settings, monkeypatch):
    monkeypatch.setenv("LOWRANK_AUTO_DATASET", "mnist")  # of a command around this one
    before = dict(os.environ)
    with unchanged_environment():
        settings.apply()
        os.environ["SET_MEANWHILE"] = "1"
        assert Settings.inherited() == settings
    assert dict(os.environ) == before


def test_relative_folders_are_relative_to_where_the_command_runs_else_to_the_project(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_DATA_DIR", "images")
    monkeypatch.chdir(tmp_path)
    assert Settings.inherited().data_dir == PROJECT / "images"
    assert Settings.inherited().path("a/b") == str(PROJECT / "a" / "b")
    command = Settings.inherited(Path.cwd())
    assert command.data_dir == tmp_path / "images"
    assert (command.path("a/b"), command.path("/a/b"), command.path("")) == (str(tmp_path / "a" / "b"), "/a/b", "")
    command.apply()
    monkeypatch.chdir(PROJECT / "notebooks")
    assert Settings.inherited() == command


def test_only_auto_gives_way_to_the_dataset_that_was_found_out():
    assert [TOLD.dataset(name) for name in ("auto", "mnist")] == ["digits", "mnist"]
    assert Settings().dataset("auto") == "auto"


def test_kernels_of_a_worker_take_its_own_data_folder_and_else_what_the_command_was_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWRANK_DATA_DIR", "on-this-node")
    read = []
    monkeypatch.setattr(execution, "execute", lambda *_, **__: read.append(Settings.inherited()) or ())
    sweep.run_point("seed=0", {}, tmp_path, sweep.shared(tmp_path), TOLD)
    assert read == [replace(TOLD, run_dir=sweep.folder_of("seed=0", tmp_path), data_dir=tmp_path / "on-this-node")]


def test_no_other_module_of_the_package_names_these_variables():
    for module in (PROJECT / "lowrank_helpers").rglob("*.py"):
        if module.name != "settings.py":
            named = set(re.findall(r"LOWRANK_\w+", module.read_text()))
            assert named <= {"LOWRANK_DATA_DIR"}, f"{module} names more than the user's own variable"
