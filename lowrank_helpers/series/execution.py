"""Executes notebooks through papermill into a run folder: in order, or side by side on Dask's workers."""

import copy
import hashlib
import io
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from filelock import FileLock, Timeout
from traitlets.config import Config

from lowrank_helpers import PROJECT, data
from lowrank_helpers.series import digest, kernels, parameters
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.results import Outcome, claims_file, read_claims, software
from lowrank_helpers.series.settings import Settings
from lowrank_helpers.series.store import TEMPORARY, write_atomically

if TYPE_CHECKING:
    from distributed import Client, Future

NOTEBOOK_FOLDER = PROJECT / "notebooks"
LOCK = ".lock"  # in a folder that a run holds: whose it is
STANDING = "lowrank-notebooks"  # topic under which workers say how their notebooks stand

# Keys for the sockets, which every user of the machine could read otherwise; the kernel warns of that.
KERNEL_CONFIG = Config(KernelManager={"transport_encryption": "auto"})


class RunFolderError(Exception):
    """The run folder cannot be used; the message says why and what to do."""


def notebook_names() -> list[str]:
    """Return the series' notebooks in order, without their endings."""
    return sorted(path.stem for path in NOTEBOOK_FOLDER.glob("*.ipynb"))


def plan(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Decide which parameters each notebook gets, and check them all before anything runs.

    Parameters
    ----------
    names : sequence of str
        Notebooks to run; empty for all.
    given : mapping
        Parameters by name; each goes to the notebooks that declare it.

    Returns
    -------
    dict
        For every notebook to run, in the series' order, the given parameters that it declares.

    Raises
    ------
    ParameterError
        There are no notebooks, one is unknown, no chosen notebook declares a parameter, or a value is not allowed.
    """
    known = notebook_names()
    if not known:
        raise ParameterError(
            f"there are no notebooks in {NOTEBOOK_FOLDER}, as an installed package has none: "
            "run this in a clone of the project, where `pip install -e .` has installed it"
        )
    if unknown := [name for name in names if name not in known]:
        raise ParameterError(f"notebook {unknown[0]!r} is unknown; allowed: {', '.join(known)}")
    chosen = [name for name in known if name in names or not names]
    declared = {name: parameters.declared(notebook_path(name)) for name in chosen}
    for parameter in given:
        if not any(parameter in defaults for defaults in declared.values()):
            valid = "; ".join(f"{name}: {', '.join(defaults)}" for name, defaults in declared.items())
            raise ParameterError(f"parameter {parameter!r} is unknown to the chosen notebooks; allowed: {valid}")
    planned = {}
    for name, defaults in declared.items():
        planned[name] = {parameter: value for parameter, value in given.items() if parameter in defaults}
        try:
            parameters.check(defaults | planned[name])
        except ParameterError as error:
            raise ParameterError(f"{name}: {error}") from error
    return planned


def notebook_path(name: str) -> Path:
    """Return where a notebook of the series lies."""
    return NOTEBOOK_FOLDER / f"{name}.ipynb"


def reads(name: str) -> set[str]:
    """Return the notebooks whose claims a notebook shows, by its metadata."""
    return set(nbformat.read(notebook_path(name), as_version=4).metadata.get("lowrank", {}).get("reads", []))


def with_what_they_read(names: Sequence[str]) -> list[str]:
    """Return notebooks together with those whose claims they show; unknown names stay, for :func:`plan` to refuse."""
    known = [name for name in names if name in notebook_names()]
    return sorted({*names}.union(*map(reads, known)))


@contextmanager
def run_folder(folder: Path, settings: Settings | None = None, *, wait: bool = False) -> Iterator[Path]:
    """Make a run folder ready and hold it: no second run may write into it meanwhile.

    Parameters
    ----------
    settings : Settings, optional
        What else the kernels are told; by default what this command was.
    wait : bool
        Wait for a run that holds the folder instead of raising.

    Raises
    ------
    RunFolderError
        The folder cannot be written, or another run holds it.
    """
    with held(folder, wait=wait) as folder:
        remove_leftovers(folder)
        told = replace(settings or Settings.of_command(), run_folder=folder, hide_bars=True)
        with told.applied(), kernels.forked():
            yield folder


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing below a folder; nothing else may be writing there."""
    for leftover in folder.rglob(f".*{TEMPORARY}*"):
        leftover.unlink()


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Make a folder and hold it for this process, as :func:`run_folder` does but for the rest."""
    folder = folder.resolve()
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=-1 if wait else 0):
            lock.write_text(f"process {os.getpid()} on {platform.node()}")
            yield folder
    except Timeout as error:
        holder = lock.read_text() or "another run"
        raise RunFolderError(f"{folder} is in use by {holder}; wait for it or choose another --output") from error
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror or error}") from error


def execute(
    planned: Mapping[str, Mapping[str, Any]], folder: Path, *, resume: bool = False, progress: bool = True
) -> Iterator[Outcome]:
    """Execute notebooks in order into a run folder, yielding how each ended.

    An executed notebook appears under its own name only when all its cells ran. One that failed is left as
    ``<name>.failed.ipynb``, and the rest still run.

    Parameters
    ----------
    planned : mapping
        As :func:`plan` returns it.
    folder : Path
        As :func:`run_folder` gives it; networks that it has are not trained again.
    resume : bool
        Keep notebooks that the folder has from the same source, parameters and package.
    progress : bool
        Show a bar for each notebook.
    """
    kept, missing = _already_there(planned, folder) if resume else ([], list(planned))
    yield from kept
    for name in missing:
        bar = {"desc": name, "unit": "cell"} if progress else False
        yield _execute_one(name, planned[name], folder, bar)


def execute_side_by_side(
    planned: Mapping[str, Mapping[str, Any]], folder: Path, client: "Client", *, resume: bool = False
) -> Iterator[tuple[list[Outcome], list[str]]]:
    """Execute notebooks into a run folder as :func:`execute` does, as many at once as there are workers.

    A network that two notebooks want is trained by one; the other waits for it. A notebook that reads what others
    found starts when these have ended.

    Yields
    ------
    list of Outcome, list of str
        Once a second or whenever a notebook ends: how those ended that did since, and how those stand that run.
    """
    from lowrank_helpers.series.cluster import ended_of  # here: other commands need not wait for the import of Dask

    standing: dict[str, str] = {}
    client.subscribe_topic(STANDING, lambda event: standing.update([event[1]]))
    kept, missing = _already_there(planned, folder) if resume else ([], list(planned))
    yield kept, []
    order = {name: i for i, name in enumerate(planned)}
    read_by = {name: reads(name) for name in missing}
    running: dict[Future, str] = {}
    while missing or running:
        awaited = {*missing, *running.values()}
        for name in [name for name in missing if not read_by[name] & awaited]:
            missing.remove(name)
            future = client.submit(_execute_in_worker, name, planned[name], folder, pure=False, priority=-order[name])
            running[future] = name
        ended = [(running.pop(future), future) for future in ended_of(running)]
        yield (
            [_outcome(name, future) for name, future in ended],
            [standing[name] for name in running.values() if name in standing],
        )


def _outcome(name: str, future: "Future") -> Outcome:
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        return Outcome(name, "failed", 0.0, "the process that ran it was killed again and again (out of memory?)")


def _execute_in_worker(name: str, given: Mapping[str, Any], folder: Path) -> Outcome:
    # Shown elsewhere, though the environment hides bars.
    bar = {"file": _Standing(name), "bar_format": f"{name} {{n}}/{{total}}", "disable": False}
    with kernels.forked():
        return _execute_one(name, given, folder, bar)


class _Standing(io.StringIO):
    """Passes the bar of a notebook on to the process that shows how all of them stand."""

    def __init__(self, name: str) -> None:
        from distributed import get_worker

        super().__init__()
        self.name = name
        self.worker = get_worker()  # here: tqdm may write from a thread of its own

    def write(self, text: str) -> int:
        if bar := text.strip():
            self.worker.log_event(STANDING, (self.name, bar))
        return len(text)


def _already_there(planned: Mapping[str, Mapping[str, Any]], folder: Path) -> tuple[list[Outcome], list[str]]:
    """Return what a run folder has of the notebooks, and the names of those to execute.

    A notebook that reads what others found is kept only if all of these are.
    """
    kept: list[Outcome] = []
    missing: list[str] = []
    read_by = {name: reads(name) for name in planned}
    for name in sorted(planned, key=lambda name: bool(read_by[name])):
        made_by = _kept(name, folder, _fingerprint(name, planned[name]))
        if made_by and not read_by[name] & {*missing}:
            kept.append(Outcome(name, "kept", made_by["seconds"]))
        else:
            missing.append(name)
    return kept, sorted(missing)


def settle_dataset(planned: Mapping[str, Mapping[str, Any]]) -> str:
    """Find out once, for all kernels, what the run's dataset is, and return it; download it if need be.

    Raises
    ------
    DatasetError
        The dataset cannot be had or is damaged.
    """
    name, given = next(iter(planned.items()))
    values = parameters.declared(notebook_path(name)) | dict(given)
    return data.resolve(values["dataset"], values["data_dir"])


def _execute_one(name: str, given: Mapping[str, Any], folder: Path, bar: Mapping[str, Any] | bool) -> Outcome:
    import papermill  # here, not above: its import takes seconds, which a refusal need not wait for

    _forget(name, folder)
    fingerprint = _fingerprint(name, given)
    partial = folder / f".{name}{TEMPORARY}.ipynb"
    start = time.perf_counter()
    reason, cell = "", None
    try:
        papermill.execute_notebook(
            notebook_path(name),
            partial,
            parameters=dict(given),
            cwd=NOTEBOOK_FOLDER,
            kernel_name="python3",
            progress_bar=bar,
            config=KERNEL_CONFIG,
            shutdown_kernel="immediate",  # all that it keeps is written by then
        )
    except papermill.PapermillExecutionError as failure:
        reason, cell = f"{failure.ename}: {failure.evalue}", failure.exec_count
    except RuntimeError as failure:  # DeadKernelError and, of a kernel that died before its first answer, no better
        reason = f"{failure} (out of memory?)"
    except KeyboardInterrupt:
        partial.unlink(missing_ok=True)
        raise
    seconds = round(time.perf_counter() - start, 2)
    _finish(partial, folder / (f"{name}.failed.ipynb" if reason else f"{name}.ipynb"), fingerprint, seconds)
    return Outcome(name, "failed" if reason else "done", seconds, reason, cell)


def _finish(partial: Path, target: Path, fingerprint: str, seconds: float) -> None:
    """Give an executed notebook its final name, with what made it and without this machine's paths."""
    notebook = nbformat.read(partial, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
    notebook.metadata.setdefault("lowrank", {}).update(fingerprint=fingerprint, seconds=seconds)
    notebook.metadata["lowrank"]["checksum"] = _checksum(notebook)
    write_atomically(target, nbformat.writes(notebook).encode())
    partial.unlink()


def _forget(name: str, folder: Path) -> None:
    """Remove what an earlier run left of a notebook, lest it be taken for this run's."""
    for file in (f"{name}.ipynb", f"{name}.failed.ipynb", f"{name}.html"):
        (folder / file).unlink(missing_ok=True)
    claims_file(folder, name).unlink(missing_ok=True)


def _kept(name: str, folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return what made an executed notebook, if it and its claims are there and would be the same now."""
    file = folder / f"{name}.ipynb"
    if not file.exists():
        return None
    try:
        executed = nbformat.read(file, as_version=4)
        made_by = executed.metadata["lowrank"]
        intact = made_by["checksum"] == _checksum(executed)
    except (OSError, ValueError, KeyError, nbformat.ValidationError):
        intact = False
    if not intact:
        warnings.warn(f"{file.name} in the run's folder is damaged or no run's; executed again", stacklevel=3)
        return None
    shown = {
        output.metadata["lowrank"]["claim"]
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "claim" in output.get("metadata", {}).get("lowrank", {})
    }
    filed = read_claims(folder).get(name, {"claims": {}})["claims"]
    return dict(made_by) if made_by.get("fingerprint") == fingerprint and shown <= filed.keys() else None


def _checksum(notebook: nbformat.NotebookNode) -> str:
    """Hash an executed notebook, but for the checksum that it holds."""
    bare = copy.deepcopy(notebook)
    bare.metadata["lowrank"].pop("checksum", None)
    return hashlib.sha256(nbformat.writes(bare).encode()).hexdigest()


def _fingerprint(name: str, given: Mapping[str, Any]) -> str:
    """Hash what determines an executed notebook: its text, which it shows, parameters, package and libraries."""
    text = [cell.source for cell in nbformat.read(notebook_path(name), as_version=4).cells]
    parts = [text, digest.of_package(), dict(given), Settings.inherited().auto_dataset, software()["versions"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def record(folder: Path) -> None:
    """Write the outputs of a run of the whole series back into ``notebooks/``."""
    for name in notebook_names():
        recorded = nbformat.read(notebook_path(name), as_version=4)
        executed = {cell.id: cell for cell in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells}
        for cell in recorded.cells:
            if cell.cell_type == "code":
                cell.outputs = executed[cell.id].outputs
                cell.execution_count = executed[cell.id].execution_count
        recorded.metadata.setdefault("lowrank", {})["outputs"] = outputs_checksum(recorded)
        write_atomically(notebook_path(name), (nbformat.writes(recorded) + "\n").encode())


def outputs_checksum(notebook: nbformat.NotebookNode) -> str:
    """Hash all outputs of a notebook: it is recorded with them, so that no digit of theirs changes unseen."""
    outputs = [[cell.id, cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()
