"""What a notebook works with: its checked parameters, the device, the data, trained networks, and its findings."""

import json
import re
import time
from collections.abc import Hashable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from threading import Event
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from torch import nn

from lowrank_helpers import data, plots
from lowrank_helpers.data import PROJECT, Dataset
from lowrank_helpers.series import parameters
from lowrank_helpers.series.results import file_findings, read_findings, software
from lowrank_helpers.series.settings import Settings
from lowrank_helpers.series.store import BusyError, Store
from lowrank_helpers.statistics import Interval
from lowrank_helpers.training import (
    History,
    Recipe,
    n_side_by_side,
    pick_device,
    pick_precision,
    side_by_side,
    spent,
    take_one_thread_each,
)

FINDING_ID = re.compile(r"[1-9B]\.\d(/[a-z0-9_]+)?")
Key = TypeVar("Key", bound=Hashable)


class Training(NamedTuple):
    """A network, how to train it, and on what (by default the run's data)."""

    model: nn.Module
    recipe: Recipe
    data: Dataset | None = None


def histories_by_label(trained: Mapping[tuple[str, int], tuple[nn.Module, History]]) -> dict[str, list[History]]:
    """Group what :meth:`Run.train_all` gave for keys (label, seed): for each label its histories, a seed each."""
    histories: dict[str, list[History]] = {}
    for (label, _), (_, history) in trained.items():
        histories.setdefault(label, []).append(history)
    return histories


def rate_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Return what :meth:`Run.rates` gives as a table to be shown: means over seeds, a row an arm, a column a rate."""
    accuracy = rates.pivot_table("accuracy", "arm", "learning_rate").map("{:.2f}".format, na_action="ignore").fillna("")
    title = f"validation accuracy (%), mean of {rates['seed'].nunique()} seeds"
    return accuracy.rename_axis(index=title, columns="rate")


class Run:
    """One notebook's work.

    Parameters
    ----------
    notebook : str
        Its name without the ending, such as ``03_rank``: where its findings are filed.
    **values
        The notebook's parameters. ``dataset``, ``data_dir``, ``seed``, ``device`` and ``precision`` are needed.

    Raises
    ------
    ParameterError, DatasetError
        A parameter is not allowed, or the dataset cannot be had.

    Attributes
    ----------
    device : torch.device
    precision : str
        ``float32`` or ``bfloat16``, of the matrix products.
    data : Dataset
        On the device, with a sixth of the training images set aside for validation: choices are made on these.
    whole_data : Dataset
        The same with all training images in their published order and no validation set: for networks all of whose
        choices have been made.
    data_dir : str
        The parameter of this name as an absolute path, for functions that look for data themselves; empty if it is.
    folder : Path
        The run's folder: ``findings/`` is below it, and ``networks/`` unless several runs share what they train.
    """

    def __init__(self, notebook: str, **values: Any) -> None:
        self._seconds_to_start = time.process_time()
        parameters.check(values)
        settings = Settings.inherited()
        settings.apply()  # from here on, no relative folder in a variable depends on where the notebook lies
        take_one_thread_each()
        plots.use_style()
        self.notebook = notebook
        self.parameters = values
        self.device = pick_device(values["device"])
        self.precision = pick_precision(values["precision"], self.device)
        self.data_dir = settings.path(values["data_dir"])
        self.whole_data = data.load(settings.dataset(values["dataset"]), self.data_dir).to(self.device)
        self.data = self.whole_data.hold_out()
        self.folder = settings.run_folder or PROJECT / "reports" / "lab"
        self._store = Store(settings.networks_folder or self.folder / "networks")
        self._moved_starts = settings.moved_starts
        self._findings: dict[str, dict[str, Any]] = {}
        self._started = datetime.now(UTC)
        display(Markdown(self._header()))

    def _header(self) -> str:
        lines = []
        if self.parameters["dataset"] == "auto" and self.data.name != "mnist":
            lines.append(
                f"⚠ **MNIST could not be had: everything below is measured on `{self.data.name}`,** "
                "scikit-learn's bundled 8×8 digits resampled to 28×28.\n"
            )
        lines.append(
            f"Dataset **{self.data.name}** ({len(self.whole_data.train_labels):,} training images, "
            f"{len(self.data.validation_labels):,} of them for validation, and {len(self.data.test_labels):,} test "
            f"images) · seed **{self.parameters['seed']}** · "
            f"device **{self.device.type}** · matrix products in **{self.precision}**, weights in float32"
        )
        return "\n".join(lines)

    def recipe(self, epochs: int, batch_size: int, learning_rate: float, **options: Any) -> Recipe:
        """Return a recipe with this run's seed (unless one is given) and precision."""
        return Recipe(
            epochs,
            batch_size,
            learning_rate,
            **{"seed": self.parameters["seed"], "precision": self.precision} | options,
        )

    def train(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        data: Dataset | None = None,
        others: Mapping[str, Dataset] | None = None,
        label: str = "training",
    ) -> tuple[nn.Module, History]:
        """Move a network to the run's device and train it, or load it if this training has been done.

        Parameters
        ----------
        model : nn.Module
            Trained in place.
        recipe : Recipe
        data : Dataset, optional
            By default the run's.
        others : mapping of str to Dataset, optional
            Further data to score on each epoch, as in :func:`lowrank_helpers.training.fit`.
        label : str
            Names the progress bar.

        Returns
        -------
        nn.Module, History
            The same network, trained, and how it went.
        """
        return self.train_all({label: Training(model, recipe, data)}, others=others)[label]

    def train_all(
        self, trainings: Mapping[Key, Training], *, others: Mapping[str, Dataset] | None = None
    ) -> dict[Key, tuple[nn.Module, History]]:
        """Train several networks as :meth:`train` does, side by side where the processor has cores for it.

        Parameters
        ----------
        trainings : mapping to Training
            The keys name the progress bars.
        others : mapping of str to Dataset, optional
            Further data to score all of them on each epoch.

        Returns
        -------
        dict
            By key, the same network, trained, and how it went.
        """
        for model, _, _ in trainings.values():
            model.to(self.device)
            if self._moved_starts:
                _move(model, self._moved_starts)

        def train(key: Key, stop: Event, *, wait: bool) -> History | None:
            model, recipe, data = trainings[key]
            label = ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
            data = data or self.data
            with suppress(BusyError):
                return self._store.trained(model, data, recipe, others=others, label=label, stop=stop, wait=wait)
            return None

        # What another process is training is left for the end: two that want the same networks share the work so.
        histories: dict[Key, History | None] = dict.fromkeys(trainings)
        for wait in (False, True):
            left = [key for key, history in histories.items() if not history]
            done = side_by_side([partial(train, key, wait=wait) for key in left], self.device)
            histories |= zip(left, done, strict=True)
        return {key: (trainings[key].model, history) for key, history in histories.items() if history}

    def rates(self) -> pd.DataFrame:
        """Return how the learning rates did that were tried for this notebook's networks, from ``sweeps/rates.csv``.

        Returns
        -------
        DataFrame
            One row a training: ``arm`` (whose rate it is), ``learning_rate``, ``seed``, and ``accuracy`` on validation
            images in percent.
        """
        tried = pd.read_csv(PROJECT / "sweeps" / "rates.csv")
        prefix = self.notebook.split("_")[0] + "/"
        own = tried[tried["arm"].str.startswith(prefix)]
        return own.assign(arm=own["arm"].str.removeprefix(prefix), accuracy=100 * own["validation_accuracy"])

    def finding(
        self,
        id: str,
        answer: str,
        evidence: str = "",
        *,
        met: bool | None = None,
        timings: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> None:
        """Show an answer with its evidence, and file its numbers under a stable id.

        Parameters
        ----------
        id : str
            An item of the assignment, ``"3.1"``, or a part of one, ``"3.1/stable_rank"``.
        answer : str
            One plain sentence that can be repeated by heart. Markdown with values in braces, formatted as by
            ``str.format``: ``"{accuracy:.2%} are correct"``.
        evidence : str
            The sentences that support it, likewise; rows of numbers belong in tables and figures.
        met : bool, optional
            For an item with a bar: whether it is reached.
        timings : mapping, optional
            Measured times and what follows from them; filed apart, as no two runs agree on them.
        **values
            Numbers, intervals, strings, lists and mappings of them.
        """
        if not FINDING_ID.fullmatch(id):
            raise ValueError(
                f"finding id {id!r} is not allowed; allowed: an item such as '3.1' or a part, '3.1/spread'"
            )
        timings = timings or {}
        answer, evidence = (
            re.sub(r"(?<=\d)%", " %", text.format(**values, **timings))  # str.format sets no space
            for text in (answer, evidence)
        )
        finding = {"answer": answer, "evidence": evidence, "met": met, "values": values, "timings": timings}
        # JSON knows no NaN; what was not measured is null.
        self._findings[id] = json.loads(json.dumps(_plain(finding)), parse_constant=lambda name: None)
        self._file_findings()
        verdict = {True: " ✓ met", False: " ✗ **not met**", None: ""}[met]
        shown = f"**{id}**{verdict} · {answer}" + (f"\n\n{evidence}" if evidence else "")
        display(Markdown(shown), metadata={"lowrank": {"finding": id}})

    def answers(self) -> None:
        """Show this notebook's answers to the assignment's items: its findings without the parts."""
        items = [f"- **{id}** {finding['answer']}" for id, finding in self._findings.items() if "/" not in id]
        display(Markdown("\n".join(items)))

    def findings(self) -> dict[str, dict[str, Any]]:
        """Return all findings filed in this run's folder for the run's dataset, by id, with their ``notebook``."""
        found: dict[str, dict[str, Any]] = {}
        for notebook, filed in read_findings(self.folder).items():
            if filed["environment"]["dataset"] == self.data.name:
                found |= {id: finding | {"notebook": notebook} for id, finding in filed["findings"].items()}
        return found

    def _file_findings(self) -> None:
        filed = {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "environment": {
                "dataset": self.data.name,
                "started": self._started.isoformat(timespec="seconds"),
                "device": _device_name(self.device),
                "precision": self.precision,
                "threads": n_side_by_side(),
            }
            | software(),
            "seconds_by_kind": self._seconds_by_kind(),
            "findings": self._findings,
        }
        file_findings(self.folder, filed)

    def _seconds_by_kind(self) -> dict[str, float]:
        """Return the processor seconds of this process so far, by kind of work."""
        known = {"starting": self._seconds_to_start} | spent
        return known | {"rest": max(0.0, time.process_time() - sum(known.values()))}


@torch.no_grad()
def _move(model: nn.Module, seed: int) -> None:
    """Move every weight to be trained by one unit in the last place, up or down as a seed draws it."""
    generator = torch.Generator().manual_seed(seed)
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        towards = torch.randint(2, weight.shape, generator=generator).to(weight).mul_(2).sub_(1) * torch.inf
        weight.copy_(torch.nextafter(weight, towards))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _plain(value: Any) -> Any:
    """Turn intervals, and NumPy's and PyTorch's numbers and arrays, into what JSON knows."""
    if isinstance(value, Interval):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return value
