"""What a notebook works with: its checked parameters, the device, the data, trained networks, and its claims."""

import re
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime
from functools import partial
from threading import Event
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from IPython.display import Markdown, display
from torch import nn

from lowrank_helpers import PROJECT, data, plots
from lowrank_helpers.data import Dataset
from lowrank_helpers.parallel import n_side_by_side, side_by_side, take_one_thread_each
from lowrank_helpers.series import claims, evidence, parameters, store
from lowrank_helpers.series.claims import Claim, Comparison
from lowrank_helpers.series.parameters import recipes
from lowrank_helpers.series.results import file_claims, read_claims, software
from lowrank_helpers.series.settings import Settings
from lowrank_helpers.training import History, Recipe, pick_device, pick_precision

CLAIM_ID = re.compile(r"[1-9B]\.\d(/[a-z0-9_]+)?")
UNCHECKED = {"lowrank": {"unchecked": True}}  # of an output that names this machine, or what other notebooks filed
FULL_SIZE = 10_000  # training labels from which on recipes are taken as they are
STAND_IN = """⚠ **MNIST could not be had: everything below is measured on `digits`,** \
scikit-learn's bundled 8×8 digits resampled to 28×28.

"""
Key = TypeVar("Key", bound=Hashable)


class Training(NamedTuple):
    """A network, how to train it, and on what (by default the run's data)."""

    model: nn.Module
    recipe: Recipe
    data: Dataset | None = None


class Run:
    """One notebook's work.

    Parameters
    ----------
    notebook : str
        Its name without the ending, such as ``03_rank``.
    variables : mapping
        The notebook's ``globals()``, which hold its parameters.

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
    data_dir : str
        The parameter of this name as an absolute path, for functions that look for data themselves; empty if it is.
    folder : Path
        The run's folder: ``claims/`` is below it, and ``networks/`` unless several runs share what they train.
    """

    def __init__(self, notebook: str, variables: Mapping[str, Any]) -> None:
        declared = parameters.declared(evidence.source_of(notebook))
        self.parameters = {name: variables[name] for name in declared if name in variables}
        parameters.check(self.parameters)
        settings = Settings.inherited()
        settings.apply()  # from here on, no relative folder in a variable depends on where the notebook lies
        take_one_thread_each()
        plots.use_style()
        self.notebook = notebook
        self.device = pick_device(self.parameters["device"])
        self.precision = pick_precision(self.parameters["precision"], self.device)
        self.data_dir = settings.path(self.parameters["data_dir"])
        dataset = settings.dataset(self.parameters["dataset"])
        self.data = data.load(dataset, self.data_dir).to(self.device).hold_out()
        self.folder = settings.run_dir or PROJECT / "reports" / "lab"
        self._networks = settings.networks_dir or self.folder / "networks"
        self._claims: dict[str, Claim] = {}
        self._evidence = evidence.quoted(notebook, self.data.name, self.parameters)
        self._code = evidence.code_of(notebook)
        self._started = datetime.now(UTC)
        sizes = {split: f"{len(labels):,}" for split, (_, labels) in self.data.splits().items()}
        images = "{train} training, {validation} validation and {test} test images".format(**sizes)
        header = f"Dataset **{self.data.name}** ({images}) · seed **{self.parameters['seed']}** · "
        header += f"device **{self.device.type}** · matrix products in **{self.precision}**, weights in float32"
        stands_in = self.parameters["dataset"] == "auto" and self.data.name != "mnist"
        display(Markdown(STAND_IN + header if stands_in else header), metadata=UNCHECKED)

    def recipe(self, kind: str, data: Dataset | None = None) -> Recipe:
        """Return how a kind of network, a name in ``recipes.yaml``, is trained with this run's seed and precision.

        A training set, by default the run's, of fewer than ``FULL_SIZE`` labels gets batches of a quarter and four
        times the epochs, as the network would take too few steps; the rate follows the batch by its square root, as
        Adam's noise does (Malladi et al. 2022, arXiv 2205.10287).
        """
        fields = recipes()[kind] | self.parameters.get("recipes", {}).get(kind, {})
        if (data or self.data).train_labels.numel() < FULL_SIZE:
            fields |= {
                "epochs": 4 * fields["epochs"],
                "batch_size": max(1, fields["batch_size"] // 4),
                "learning_rate": fields["learning_rate"] / 2,
            }
        return Recipe(**fields, seed=self.parameters["seed"], precision=self.precision)

    def train(
        self, model: nn.Module, recipe: Recipe, *, data: Dataset | None = None, label: str = "training", **options: Any
    ) -> tuple[nn.Module, History]:
        """Train one network as :meth:`train_all` does, with its options; the label names the progress bar."""
        return self.train_all({label: Training(model, recipe, data)}, **options)[label]

    def train_all(
        self, trainings: Mapping[Key, Training], *, others: Mapping[str, Dataset] | None = None
    ) -> dict[Key, tuple[nn.Module, History]]:
        """Train networks in place on the run's device, or load those whose training has been done.

        They train side by side where the processor has cores for it. The keys name the progress bars.

        Parameters
        ----------
        others : mapping of str to Dataset, optional
            Further data to score all of them on, as in :func:`lowrank_helpers.training.fit`.

        Returns
        -------
        dict
            By key, the same network, trained, and how it went.
        """

        def train(key: Key, stop: Event) -> tuple[nn.Module, History]:
            model, recipe, data = trainings[key]
            label = ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
            model.to(self.device)
            given = model, data or self.data, recipe
            return model, store.trained(self._networks, *given, others=others, label=label, stop=stop)

        trained = side_by_side([partial(train, key) for key in trainings], self.device)
        return dict(zip(trainings, trained, strict=True))

    def claim(
        self,
        id: str,
        sentence: str,
        *,
        holds: bool | None = None,
        larger: Mapping[str, tuple[str, str]] | None = None,
        smaller: Mapping[str, tuple[str, str]] | None = None,
        alike: Mapping[str, tuple[str, str]] | None = None,
        counts: float | None = None,
        measured: Mapping[str, Any] | None = None,
        series: Mapping[str, Any] | None = None,
        timings: Mapping[str, Any] | None = None,
    ) -> None:
        """Show a claim beside what this run and the recorded runs measured, and file it.

        Parameters
        ----------
        id : str
            An item of the assignment, ``"3.1"``, or a part of one, ``"3.1/stable_rank"``.
        sentence : str
            One plain sentence that a reader can repeat. Measured numbers stand in the table, not here.
        holds : bool
            Whether it holds in this run: for what must hold in every run. The recorded runs count how often it does.
        larger, smaller, alike : mapping of str to (str, str)
            For what holds on average and is smaller than the luck of one run: by quantity, the label that is larger
            than, smaller than, or like the other one. The recorded runs decide by the mean paired difference.
        counts : float
            The least relative difference that matters, from :mod:`lowrank_helpers.series.counts`; with those three.
        measured : mapping of str to number or mapping of numbers
            Quantities shown in the table, by name (with the unit) and label.
        series : mapping of str to mapping of numbers
            Quantities by rank, epoch or budget, which a figure shows.
        timings : mapping of str to number or mapping of numbers
            Times and what follows from them: no two machines agree on these.
        """
        if not CLAIM_ID.fullmatch(id):
            raise ValueError(f"claim id {id!r} is not allowed; allowed: an item such as '3.1' or a part, '3.1/spread'")
        comparisons = [
            Comparison(quantity, str(first), str(second), relation, float(counts or 0))
            for relation, pairs in {"larger": larger, "smaller": smaller, "alike": alike}.items()
            for quantity, (first, second) in (pairs or {}).items()
        ]
        if bool(comparisons) == (holds is not None) or bool(comparisons) != (counts is not None):
            raise ValueError(f"claim {id} needs either holds, or counts with larger, smaller or alike")
        parts = [claims.quantities(values or {}) for values in (measured, series, timings)]
        names = [name for part in parts for name in part]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"claim {id} has the quantity {twice[0]!r} more than once")
        claim = Claim(id, sentence, None if holds is None else bool(holds), comparisons, *parts)
        self._claims[id] = claim
        self._file_claims()
        display(Markdown(claims.markdown(claim, *self._evidence.of(id))), metadata={"lowrank": {"claim": id}})

    def recorded(self, id: str, quantity: str) -> pd.DataFrame:
        """Return a quantity of a claim in the recorded runs, for a pale band behind this run's line.

        The table has a row a run and a column a label, and is empty where no run with these parameters is recorded.
        """
        frame = pd.DataFrame(self._evidence.of(id)[1].get(quantity, {}))
        places = pd.to_numeric(pd.Series(frame.columns), errors="coerce")
        return frame if places.isna().any() else frame.set_axis(places, axis="columns")

    def answers(self, *, of_all: bool = False) -> None:
        """Show the answers to the assignment's items, which are the claims without the parts, and how each stands.

        They are this notebook's, or those ``of_all`` notebooks that have run in this folder on this dataset.
        """
        lines = []
        for name, filed in read_claims(self.folder).items():
            if filed["environment"]["dataset"] == self.data.name and (of_all or name == self.notebook):
                recorded = evidence.quoted(name, self.data.name, filed["parameters"])
                for id, claim in filed["claims"].items():
                    if "/" not in id:
                        verdict = claims.verdict(claim, *recorded.of(id))
                        lines.append(f"- **{id}** {claim.sentence} *{verdict.short}*")
        display(Markdown("\n".join(lines)), metadata=UNCHECKED if of_all else None)

    def _file_claims(self) -> None:
        environment = {
            "dataset": self.data.name,
            "started": self._started.isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": self.precision,
            "threads": n_side_by_side(),
        }
        made_by = {"parameters": self.parameters, "environment": environment | self._code | software()}
        file_claims(self.folder, {"notebook": self.notebook, **made_by, "claims": self._claims})
