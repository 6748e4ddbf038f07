"""What a command tells the notebooks and workers that it starts.

It travels in environment variables, as that is what a kernel inherits; they are written and read here alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from lowrank_helpers import PROJECT


@dataclass(frozen=True)
class Settings:
    """What one process was told by the one that started it, or tells those that it starts.

    The variable of ``run_dir`` is ``LOWRANK_RUN_DIR``, and so on. ``LOWRANK_DATA_DIR`` is the user's own.
    """

    run_dir: Path | None = None  # where a notebook files what it finds; None in JupyterLab, where no command runs it
    networks_dir: Path | None = None  # where several runs share what they train; None for a run's own folder
    data_dir: Path | None = None  # where data are looked for first
    started_in: Path = PROJECT  # what the user's relative paths are relative to: the folder of the command, if one runs
    auto_dataset: str = ""  # what the dataset ``auto`` stands for; empty where that has not been found out

    @classmethod
    def inherited(cls, started_in: Path | None = None) -> "Settings":
        """Return what this process was told; a command or a worker says itself where it was started."""
        said = {field.name: os.environ.get(_variable(field.name), "") for field in fields(cls)}
        started_in = started_in or Path(said["started_in"] or PROJECT)
        folders = {name: started_in / said[name] for name in said if name.endswith("_dir") and said[name]}
        return cls(**folders, started_in=started_in, auto_dataset=said["auto_dataset"])

    def apply(self) -> None:
        """Put all of it into this process's environment, for what it starts and for libraries that read it there."""
        for name, value in vars(self).items():
            os.environ.pop(_variable(name), None)
            if value:
                os.environ[_variable(name)] = str(value)

    def dataset(self, name: str) -> str:
        """Return the dataset that a name means: for ``auto`` the one that was found out, if it was."""
        return self.auto_dataset if name == "auto" and self.auto_dataset else name

    def path(self, given: str) -> str:
        """Return a path that the user gave as an absolute one; an empty one means none, and stays so."""
        return str(self.started_in / given) if given else ""


def _variable(name: str) -> str:
    return f"LOWRANK_{name.upper()}"


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undo at the end what has been done to this process's environment meanwhile."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for added in os.environ.keys() - before.keys():
            del os.environ[added]
        os.environ |= before
