"""Executes notebooks through papermill into a run folder, as many at once as there are workers."""

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import nbformat
from filelock import FileLock, Timeout
from traitlets.config import Config

from lowrank_helpers import PROJECT, data
from lowrank_helpers.series import digest, kernels, parameters
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.results import Outcome, claims_file, read_claims, software
from lowrank_helpers.series.settings import Settings, unchanged_environment
from lowrank_helpers.series.store import TEMPORARY, write_atomically

NOTEBOOK_FOLDER = PROJECT / "notebooks"
ENDINGS = (".ipynb", ".failed.ipynb", ".html")  # of what a run folder has of a notebook
LOCK = ".lock"  # in a locked folder: which process locked it

Planned = dict[str, dict[str, Any]]  # one run: by notebook the parameters that it gets


class RunError(Exception):
    """A run cannot start or go on: its folder, the scheduler or a worker is unusable, or notebooks failed."""


def notebook_names() -> list[str]:
    """Return the series' notebooks in order, without their endings."""
    return sorted(path.stem for path in NOTEBOOK_FOLDER.glob("*.ipynb"))


def notebook_path(name: str) -> Path:
    """Return where a notebook of the series lies."""
    return NOTEBOOK_FOLDER / f"{name}.ipynb"


def reads(name: str, what: str = "reads") -> set[str]:
    """Return the notebooks whose claims a notebook shows, or whose networks it ``loads``, by its metadata."""
    return {*json.loads(notebook_path(name).read_text())["metadata"].get("lowrank", {}).get(what, [])}


def with_what_they_read(names: Sequence[str]) -> list[str]:
    """Return notebooks together with those whose claims they show; unknown names stay, for :func:`plan` to refuse."""
    known = [name for name in names if name in notebook_names()]
    return sorted({*names}.union(*map(reads, known)))


def plan(names: Sequence[str], given: Mapping[str, Any]) -> Planned:
    """Return, for each of these notebooks (all, if none is named), the given parameters that it declares.

    The notebooks are in the series' order. All parameters are checked here, before anything runs.

    Raises
    ------
    ParameterError
        There are no notebooks, one is unknown, no chosen notebook declares a parameter, or a value is not allowed.
    """
    if not (known := notebook_names()):
        what = "an installed package has none; run this in a clone of the project, after `pip install -e .` there"
        raise ParameterError(f"there are no notebooks in {NOTEBOOK_FOLDER}: {what}")
    if unknown := [name for name in names if name not in known]:
        raise ParameterError(f"notebook {unknown[0]!r} is unknown; allowed: {', '.join(known)}")
    declared = {name: parameters.declared(notebook_path(name)) for name in known if name in names or not names}
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


def settle_dataset(planned: Planned, resolve: Callable[[str, str], str] = data.resolve) -> str:
    """Find out once, for all kernels, what the run's dataset is, and return it; download it if need be.

    Raises
    ------
    DatasetError
        The dataset cannot be had or is damaged.
    """
    name, given = next(iter(planned.items()))
    values = parameters.declared(notebook_path(name)) | given
    return resolve(values["dataset"], values["data_dir"])


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Make a folder and lock it: no second run may write into it meanwhile.

    Raises
    ------
    RunError
        The folder cannot be written, or another run has locked it and this one is not to ``wait``.
    """
    folder = folder.resolve()
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=-1 if wait else 0):
            lock.write_text(f"process {os.getpid()} on {platform.node()}")
            yield folder
    except Timeout as error:
        holder = lock.read_text() or "another run"
        raise RunError(f"{folder} is in use by {holder}; wait for it or choose another --output") from error
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error


@contextmanager
def run_folder(folder: Path, *, wait: bool = False, **told: Any) -> Iterator[Path]:
    """Lock a run folder as :func:`locked` does, and make this process ready to start kernels for it.

    They inherit this process's settings, but for those that they are ``told``: fields of :class:`Settings`.
    """
    with locked(folder, wait=wait) as folder, unchanged_environment(), kernels.forked():
        remove_leftovers(folder)
        replace(Settings.inherited(Path.cwd()), run_dir=folder, **told).apply()
        os.environ["TQDM_DISABLE"] = "1"  # bars would stay in recorded outputs as debris
        yield folder


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing below a folder; nothing else may be writing there."""
    for leftover in folder.rglob(f".*{TEMPORARY}*"):
        leftover.unlink()


def execute(planned: Planned, folder: Path, *, workers: int | None = None, resume: bool = False) -> Iterator[Outcome]:
    """Execute notebooks into a run folder, yielding how each ended as soon as it has.

    An executed notebook appears under its own name only when all its cells ran. One that failed is left as
    ``<name>.failed.ipynb``, and the rest still run. A notebook that shows what others claim, or loads what they train,
    starts when these have ended.

    Parameters
    ----------
    planned, folder
        As :func:`plan` and :func:`run_folder` give them.
    workers : int, optional
        How many notebooks run at once, each in a kernel of its own; by default one a core.
    resume : bool
        Keep notebooks that the folder has from the same source, parameters and package.
    """
    from dask.system import CPU_COUNT  # what containers and affinities allow; here, as its import takes a second

    workers = workers or CPU_COUNT
    read_by = {name: reads(name) for name in planned}
    # All here: Python 3.11 parses code into trees in one thread alone.
    fingerprints = {name: _fingerprint(name, given) for name, given in planned.items()}
    kept = _kept(fingerprints, read_by, folder) if resume else {}
    yield from kept.values()
    missing = [name for name in planned if name not in kept]
    after = {name: read_by[name] | reads(name, "loads") for name in missing}
    running: set[str] = set()
    ended: SimpleQueue[Outcome] = SimpleQueue()
    while missing or running:
        ready = [name for name in missing if not after[name] & {*missing, *running}]
        ready.sort(key=lambda name: -sum(name in others for others in after.values()))  # what most others wait for
        for name in ready[: workers - len(running)]:
            missing.remove(name)
            running.add(name)
            # A thread waits for its kernel, and is a daemon: an interrupted command does not wait for it.
            given = name, planned[name], folder, fingerprints[name]
            Thread(target=lambda given=given: ended.put(_execute(*given)), daemon=True).start()
        outcome = ended.get()
        running.remove(outcome.notebook)
        yield outcome


def _execute(name: str, given: dict[str, Any], folder: Path, fingerprint: str) -> Outcome:
    import papermill  # here, not above: its import takes seconds, which a refusal need not wait for

    partial = folder / f".{name}{TEMPORARY}.ipynb"
    start = time.perf_counter()
    error = ""
    try:
        # What an earlier run left must not be taken for this run's.
        for file in (*(folder / f"{name}{ending}" for ending in ENDINGS), claims_file(folder, name)):
            file.unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                notebook_path(name),
                partial,
                parameters=given,
                resources={"metadata": {"path": str(NOTEBOOK_FOLDER)}},  # papermill's cwd is of all threads
                kernel_name="python3",
                progress_bar={"desc": name, "unit": "cell", "disable": None},  # in a terminal alone
                # Keys for the sockets, which every user of the machine could read otherwise; the kernel warns of that.
                config=Config(KernelManager={"transport_encryption": "auto"}),
                shutdown_kernel="immediate",  # all that it keeps is written by then
            )
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
        except RuntimeError as failure:  # DeadKernelError and, of a kernel that died before its first answer, no better
            error = f"{failure} (out of memory?)"
        seconds = round(time.perf_counter() - start, 2)
        _finish(partial, folder / f"{name}{ENDINGS[bool(error)]}", fingerprint, seconds)
    except Exception as failure:  # such as a full disk; the other notebooks still run
        error = f"{type(failure).__name__}: {failure}"
    return Outcome(name, "failed" if error else "done", round(time.perf_counter() - start, 2), error)


def _finish(partial: Path, target: Path, fingerprint: str, seconds: float) -> None:
    """Give an executed notebook its final name, with what made it and without this machine's paths."""
    notebook = nbformat.read(partial, as_version=4)
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)
    made_by = {"fingerprint": fingerprint, "seconds": seconds, "outputs": outputs_checksum(notebook)}
    notebook.metadata.setdefault("lowrank", {}).update(made_by)
    write_atomically(target, nbformat.writes(notebook).encode())
    partial.unlink()


def _fingerprint(name: str, given: dict[str, Any]) -> str:
    """Hash what determines an executed notebook: its text, which it shows, parameters, package and libraries."""
    text = [cell.source for cell in nbformat.read(notebook_path(name), as_version=4).cells]
    return digest.of_json([text, digest.of_package(), given, Settings.inherited().auto_dataset, software()["versions"]])


def _kept(fingerprints: Mapping[str, str], read_by: Mapping[str, set[str]], folder: Path) -> dict[str, Outcome]:
    """Return the notebooks that a run folder has as they would be now, and so are all planned ones that they read."""
    filed = read_claims(folder)
    kept: dict[str, Outcome] = {}
    for name in sorted(fingerprints, key=lambda name: bool(read_by[name])):
        file = folder / f"{name}.ipynb"
        if not file.exists() or not read_by[name] & fingerprints.keys() <= kept.keys():
            continue
        try:
            executed = nbformat.read(file, as_version=4)
            made_by = executed.metadata["lowrank"]
            if made_by["outputs"] != outputs_checksum(executed):
                raise ValueError("outputs do not match their checksum")
        except (OSError, ValueError, KeyError, nbformat.ValidationError):
            warnings.warn(f"{file.name} in the run's folder is damaged or no run's; executed again", stacklevel=3)
            continue
        claimed = {id for id, _ in marked(executed, "claim")}
        claims = filed[name]["claims"] if name in filed else {}
        if made_by.get("fingerprint") == fingerprints[name] and claimed <= claims.keys():
            kept[name] = Outcome(name, "kept", made_by["seconds"])
    return kept


def marked(notebook: nbformat.NotebookNode, mark: str) -> list[tuple[Any, nbformat.NotebookNode]]:
    """Return the outputs of a notebook that carry a mark of this package's, after its value."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    marks = [(output.get("metadata", {}).get("lowrank", {}).get(mark), output) for output in outputs]
    return [(value, output) for value, output in marks if value]


def outputs_checksum(notebook: nbformat.NotebookNode) -> str:
    """Hash all outputs of a notebook, which carries the hash so that no digit of them changes unseen."""
    return digest.of_json([[cell.id, cell.outputs] for cell in notebook.cells if cell.cell_type == "code"])
