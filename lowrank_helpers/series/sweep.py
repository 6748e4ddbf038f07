"""A sweep: the same notebooks at every point of a grid of parameters, each point a run of its own, on Dask distributed.

A worker runs one point at a time, and the kernel that it starts takes as many threads as the worker's
``OMP_NUM_THREADS`` says.
"""

import math
import os
import platform
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distributed import Client, as_completed

from lowrank_helpers.series import digest, execution, parameters
from lowrank_helpers.series.execution import Planned, RunError
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.results import failures, software
from lowrank_helpers.series.settings import Settings

WHOLE_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")
MAX_POINTS = 10_000  # of a sweep: days of work for a cluster, and what the page can still show


@dataclass(frozen=True)
class Sweep:
    """What is to run: notebooks (none named: all) at all points of a grid, with other parameters fixed."""

    notebooks: Sequence[str]
    grid: Mapping[str, Sequence[Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def folder_of(point: str, sweep_folder: Path) -> Path:
    """Return where a point's run lies in a sweep's folder."""
    return sweep_folder / "points" / point


def as_text(value: Any) -> str:
    """Write a parameter's value in one word: a list as ``784-512-512-10``."""
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def grid_axis(text: str) -> tuple[str, Sequence[Any]]:
    """Read an axis of the grid: ``seed=0..9`` (both included), ``activation=relu,tanh``, or a YAML list of values.

    Raises
    ------
    ParameterError
        The text is not of the form NAME=VALUES, or the values are not YAML.
    """
    name, _, values = text.partition("=")
    if not name or not values:
        raise ParameterError(f"grid {text!r} is not NAME=VALUES, such as seed=0..9 or activation=relu,tanh")
    if match := WHOLE_RANGE.fullmatch(values):
        return name, range(int(match[1]), int(match[2]) + 1)
    given = parameters.parse(f"[{values}]", f"grid {name}")
    return name, given[0] if len(given) == 1 and isinstance(given[0], list) else given


def points(sweep: Sweep) -> dict[str, Planned]:
    """Return what each point of a sweep is to run, by a name that a folder can have: ``activation=tanh,seed=3``.

    The last axis varies fastest.

    Raises
    ------
    ParameterError
        There is no grid, an axis is empty, repeats a value or is fixed too, there are more than ``MAX_POINTS`` points,
        or :func:`execution.plan` refuses one.
    """
    if not sweep.grid:
        raise ParameterError("a sweep needs a grid: -g NAME=VALUES; for one run: lowrank run")
    if both := sweep.grid.keys() & sweep.parameters.keys():
        raise ParameterError(f"parameter {min(both)} is both fixed and in the grid")
    if (n_points := math.prod(map(len, sweep.grid.values()))) > MAX_POINTS:
        raise ParameterError(f"the grid has {n_points:,} points; allowed: at most {MAX_POINTS:,}")
    for name, values in sweep.grid.items():
        if not values:
            raise ParameterError(f"grid {name} has no values")
        if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
            raise ParameterError(f"grid {name} has {repeated[0]!r} more than once")
    found = {}
    for values in product(*sweep.grid.values()):
        setting = dict(zip(sweep.grid, values, strict=True))
        name = ",".join(f"{axis}={quote(as_text(value), safe='')}" for axis, value in setting.items())
        found[name] = execution.plan(sweep.notebooks, {**sweep.parameters, **setting})
    return found


def run(
    client: Client, points: Mapping[str, Planned], folder: Path, datasets: Mapping[str, str], *, resume: bool
) -> Iterator[tuple[str, str]]:
    """Run points on a cluster's workers, yielding each when it has ended, with the error if it failed twice.

    What a point had done before it failed, or before its worker died, is not done again.

    Parameters
    ----------
    folder : Path
        The sweep's, locked by this process.
    datasets : mapping of str to str
        Of each point, as :func:`execution.settle_dataset` returned it.
    resume : bool
        Keep what an earlier sweep left of the points.

    Raises
    ------
    RunError
        A worker differs from this process, does not see the folder, or the scheduler is lost; or what an earlier sweep
        left cannot be removed.
    """
    needed = shared(folder)
    settings = replace(Settings.inherited(Path.cwd()), networks_dir=folder / "networks")
    try:
        client.run(check_shared, needed, folder)
        if not resume:
            _clear(points, folder)
        futures = {}
        for point, planned in points.items():
            given = point, planned, folder, needed, replace(settings, auto_dataset=datasets[point])
            futures[client.submit(run_point, *given, retries=1, pure=False)] = point
        for future in as_completed(futures):
            raised = future.exception()
            kind = "" if raised is None or isinstance(raised, RunError) else f"{type(raised).__name__}: "
            yield futures[future], f"{kind}{raised or ''}"
        execution.remove_leftovers(folder / "networks")  # of workers that were killed
    except (OSError, CancelledError) as error:
        raise RunError("the scheduler is lost; add --resume to go on") from error
    except ModuleNotFoundError as error:
        raise RunError(f"a worker lacks {error.name}: install this package where workers run") from error


def _clear(points: Iterable[str], folder: Path) -> None:
    """Remove what an earlier sweep left: what stays would be taken for this one's."""
    for earlier in (folder_of(point, folder) for point in points):
        try:
            if earlier.exists():
                shutil.rmtree(earlier)
        except OSError as error:
            raise RunError(f"cannot remove {earlier}: {error.strerror or error}") from error


def shared(folder: Path) -> dict[str, str]:
    """Return what workers must have in common with the process that runs a sweep: versions, and the sweep's folder.

    The text of its lock stands for the folder: one of the same name on another disk does not have it.
    """
    lock = folder / execution.LOCK
    holder = f"that of {lock.read_text()}" if lock.is_file() else "missing"
    return _installed() | {f"{lock} (on a file system that all share)": holder}


def check_shared(needed: Mapping[str, str], folder: Path) -> None:
    """Raise a :class:`RunError` that names the worker that this runs on, if it has something else than is needed."""
    for name, here in shared(folder).items():
        if here != needed[name]:
            worker = f"process {os.getpid()} on {platform.node()}"
            raise RunError(f"worker {worker} differs from the sweep: {name} is {here}, and must be {needed[name]}")


@cache
def _installed() -> dict[str, str]:
    """Return the versions of all that decides what a point finds."""
    notebooks = [digest.of_notebook(execution.notebook_path(name)) for name in execution.notebook_names()]
    code = f"{digest.of_package()[:12]} {digest.of_cells(notebooks)[:12]}"
    return {"code and notebooks": code, "python": software()["python"], **software()["versions"]}


_one_at_a_time = threading.Lock()  # in a worker with several threads: kernels inherit the environment of the process


def run_point(point: str, planned: Planned, sweep_folder: Path, needed: Mapping[str, str], settings: Settings) -> None:
    """Execute a point's notebooks in a worker.

    The kernels inherit the sweep's settings, but for the folder with data: that variable is the worker's.
    No pages are rendered: they take megabytes a point, and ``lowrank run`` with the same parameters makes them.

    Raises
    ------
    RunError
        A notebook failed; the others still ran.
    """
    check_shared(needed, sweep_folder)
    told = {name: value for name, value in vars(settings).items() if name not in ("run_dir", "data_dir")}
    # A sweep that was stopped may have left the point to a worker that is still at it.
    with _one_at_a_time, execution.run_folder(folder_of(point, sweep_folder), wait=True, **told) as folder:
        failed = failures(list(execution.execute(planned, folder, workers=1, resume=True)))
    if failed:
        raise RunError("; ".join(failed))
