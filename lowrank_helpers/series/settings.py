"""What a command tells the notebooks and workers that it starts.

It travels in environment variables, as that is what a kernel inherits; they are written and read here alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowrank_helpers import PROJECT

VARIABLES = {
    "run_folder": "LOWRANK_RUN_DIR",
    "networks_folder": "LOWRANK_NETWORKS_DIR",
    "data_folder": "LOWRANK_DATA_DIR",
    "started_in": "LOWRANK_STARTED_IN",
    "auto_dataset": "LOWRANK_AUTO_DATASET",
    "hide_bars": "TQDM_DISABLE",
}


@dataclass(frozen=True)
class Settings:
    """What one process was told by the one that started it, or tells those that it starts.

    Attributes
    ----------
    run_folder : Path, optional
        Where a notebook files what it finds. None: no command runs it, it is open in JupyterLab.
    networks_folder : Path, optional
        Where several runs share what they train; None for a run's own folder.
    data_folder : Path, optional
        Where data are looked for first. This variable is the user's own.
    started_in : Path
        What a relative path that the user gave is relative to: the folder where the command was started, or the
        project where there is no command.
    auto_dataset : str
        What the dataset ``auto`` stands for; empty where that has not been found out.
    hide_bars : bool
        No progress bars, which would stay in recorded outputs as debris. This variable is tqdm's own.
    """

    run_folder: Path | None = None
    networks_folder: Path | None = None
    data_folder: Path | None = None
    started_in: Path = PROJECT
    auto_dataset: str = ""
    hide_bars: bool = False

    @classmethod
    def inherited(cls) -> "Settings":
        """Return what this process, a notebook's kernel, was told."""
        return cls._read(Path(os.environ.get(VARIABLES["started_in"]) or PROJECT))

    @classmethod
    def of_command(cls) -> "Settings":
        """Return what this process, a command or a worker, was told; it starts in the current folder."""
        return cls._read(Path.cwd())

    @classmethod
    def _read(cls, started_in: Path) -> "Settings":
        said = {name: os.environ.get(variable, "") for name, variable in VARIABLES.items()}
        folders = {name: started_in / said[name] for name in said if name.endswith("_folder") and said[name]}
        return cls(
            **folders,
            started_in=started_in,
            auto_dataset=said["auto_dataset"],
            hide_bars=bool(said["hide_bars"]),
        )

    def apply(self) -> None:
        """Put all of it into this process's environment, for what it starts and for libraries that read it there."""
        said = {name: "1" if value is True else str(value) for name, value in vars(self).items() if value}
        for name, variable in VARIABLES.items():
            os.environ.pop(variable, None)
            if name in said:
                os.environ[variable] = said[name]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply it for a while, and leave no trace in the environment."""
        with unchanged_environment():
            self.apply()
            yield

    def dataset(self, name: str) -> str:
        """Return the dataset that a name means: for ``auto`` the one that was found out, if it was."""
        return self.auto_dataset if name == "auto" and self.auto_dataset else name

    def path(self, given: str) -> str:
        """Return a path that the user gave as an absolute one; an empty one means none, and stays so."""
        return str(self.started_in / given) if given else ""


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
