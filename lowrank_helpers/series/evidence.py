"""Evidence: what notebooks measured in many recorded runs, a small file a notebook, in the repository.

``scripts/evidence.py`` runs the series from many seeds and writes it. A notebook shows its claims beside it, and
``lowrank check`` compares a new run with it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_helpers import PROJECT
from lowrank_helpers.series import digest
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.store import write_atomically
from lowrank_helpers.statistics import interval

FOLDER = PROJECT / "evidence"
FREE = ("seed", "device", "precision", "data_dir", "dataset")  # parameters in which a run may differ from the evidence
CODE = {"source": "the notebook", "package": "the package"}  # what decides what it measures, by its digest's name
FALSE_ALARMS = 0.01  # of a whole check of a run that is one more of the same kind
LEAST = 1e-3  # share of a number below which no difference is one: of images, as many have a wrong label


@dataclass(frozen=True)
class Evidence:
    """What the recorded runs of one notebook measured."""

    notebook: str
    dataset: str
    parameters: dict[str, Any]  # of all recorded runs, but for those in ``FREE``
    made_by: dict[str, Any]  # ``revision``, ``versions``, and the digests ``package`` and ``source`` of the code
    runs: list[dict[str, Any]]  # ``seed`` and ``precision`` of each
    holds: dict[str, list[bool]]  # by claim, whether it held in each run; without claims that only several runs decide
    measured: dict[str, dict[str, dict[str, list[float | None]]]]  # by claim, quantity and label: one value a run

    def of(self, id: str) -> tuple[list[bool], dict[str, dict[str, list[float | None]]]]:
        """Return in which recorded runs a claim held, and what they measured for it."""
        return self.holds.get(id, []), self.measured.get(id, {})

    @property
    def n_values(self) -> int:
        """How many numbers a run measures."""
        return sum(len(of) for quantities in self.measured.values() for of in quantities.values())


def read(notebook: str, dataset: str) -> Evidence | None:
    """Read a notebook's evidence on a dataset; None where none is recorded."""
    file = FOLDER / dataset / f"{notebook}.json"
    return Evidence(**json.loads(file.read_text())) if file.exists() else None


def kind_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in which a run must be as the recorded ones."""
    return {name: value for name, value in parameters.items() if name not in FREE}


def quoted(notebook: str, dataset: str, parameters: Mapping[str, Any]) -> Evidence:
    """Return a notebook's evidence from runs with these parameters, which has no runs where none are recorded."""
    recorded, given = read(notebook, dataset), kind_of(parameters)
    if recorded and recorded.parameters == given:
        return recorded
    return Evidence(notebook, dataset, given, {}, [], {}, {})


def write(evidence: Evidence) -> Path:
    """Write evidence to its file, the values of a quantity in a line, and return the file."""
    text = json.dumps(asdict(evidence), indent=1, ensure_ascii=False)
    text = re.sub(r'\[\n[^]["{}]*\]', lambda numbers: "".join(numbers[0].split()), text)
    file = FOLDER / evidence.dataset / f"{evidence.notebook}.json"
    write_atomically(file, f"{text}\n".encode())
    return file


def changed(evidence: Evidence) -> list[str]:
    """Name what has changed since evidence was recorded: ``the notebook``, ``the package``, both or nothing."""
    code = code_of(evidence.notebook)
    return [CODE[name] for name in CODE if evidence.made_by[name] != code[name]]


def source_of(notebook: str) -> Path:
    """Return where a notebook of the series lies."""
    return PROJECT / "notebooks" / f"{notebook}.ipynb"


def code_of(notebook: str) -> dict[str, str]:
    """Return the digests of today's code that claims are filed with: the notebook's, and of the package it imports."""
    file = source_of(notebook)
    return {"source": digest.of_notebook(file), "package": digest.of_science(file)}


def unlike(evidence: Evidence, claims: Mapping[str, Claim], n_values: int) -> list[str]:
    """Hold a run's claims against the recorded runs, and return a line for each number or claim that is unlike them.

    A number must lie in the :func:`limits` that its recorded values give to one of ``n_values`` numbers. What had a
    value in all recorded runs must have one, and what held in all of them must hold. Times are left out.
    """
    lines = []
    for id, claim in claims.items():
        if id not in evidence.measured:
            lines.append(f"{id} is not in the evidence: record it anew")
            continue
        if all(evidence.holds.get(id, [])) and claim.holds is False:
            lines.append(f"{id} does not hold, and held in all {len(evidence.runs)} recorded runs: {claim.sentence}")
        for name, values in (claim.measured | claim.series).items():
            for label, value in values.items():
                recorded = evidence.measured[id].get(name, {}).get(label, [])
                if said := _beyond(value, recorded, n_values):
                    lines.append(f"{': '.join(filter(None, (id, name, label)))} {said}")
    return lines


def _beyond(value: float | None, recorded: Sequence[float | None], n_values: int) -> str:
    """Say how a number is unlike its recorded values; empty where it is like them, or where one value or none is."""
    known = [x for x in recorded if x is not None]
    if len(known) < 2:
        return ""
    if value is None:
        return "has no value, and has one in all recorded runs" if len(known) == len(recorded) else ""
    low, high = limits(known, n_values)
    return "" if low <= value <= high else f"is {value:.6g}; expected {low:.6g} to {high:.6g}"


def limits(values: Sequence[float], n_values: int) -> tuple[float, float]:
    """Return where one more value lies, with a false alarm in one of a hundred checks of ``n_values`` numbers.

    It is the prediction interval of the values, joined with that of their logarithms where all are positive: what
    varies by large factors is skewed. Whole numbers may differ by one at least, and others by a thousandth.
    """
    confidence = 1 - FALSE_ALARMS / n_values
    found = interval(values, confidence, of_one_more=True)
    least = 1.0 if all(isinstance(x, int) for x in values) else LEAST * abs(found.mean)
    ends = [found.low, found.high, found.mean - least, found.mean + least]
    if min(values) > 0:
        logs = interval(np.log(values), confidence, of_one_more=True)
        with np.errstate(over="ignore"):  # of two or three values
            ends += np.exp([logs.low, logs.high]).tolist()
    return min(ends), max(ends)
