"""Evidence: what notebooks measured in many recorded runs, a small file a notebook, in the repository.

``lowrank evidence`` runs the series from many seeds and writes it; a notebook shows its claims beside it; ``lowrank
check`` holds a new run against it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_helpers.data import PROJECT
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.results import read_claims
from lowrank_helpers.series.store import write_atomically
from lowrank_helpers.statistics import prediction_interval

FOLDER = PROJECT / "evidence"
SEEDS = range(1, 21)  # of the recorded runs; the notebooks show seed 0
FREE = ("seed", "device", "precision", "data_dir", "dataset")  # parameters in which a run may differ from the evidence
DIGITS = 5  # of a recorded number
FALSE_ALARMS = 0.01  # of a whole check of a run that is one more of the same kind


@dataclass(frozen=True)
class Evidence:
    """What the recorded runs of one notebook measured.

    Attributes
    ----------
    notebook, dataset : str
    parameters : dict
        Of all recorded runs, but for those in ``FREE``.
    made_by : dict
        ``revision`` and ``versions``, and the digests ``package`` and ``source`` of the code that ran.
    runs : list of dict
        ``seed`` and ``precision`` of each.
    holds : dict of str to list of bool
        By claim, whether it held in each run; empty for a claim that only several runs decide.
    measured : dict
        By claim, quantity and label one value a run.
    """

    notebook: str
    dataset: str
    parameters: dict[str, Any]
    made_by: dict[str, Any]
    runs: list[dict[str, Any]]
    holds: dict[str, list[bool]]
    measured: dict[str, dict[str, dict[str, list[float | None]]]]

    def of(self, id: str) -> tuple[list[bool], dict[str, dict[str, list[float | None]]]]:
        """Return in which recorded runs a claim held, and what they measured for it."""
        return self.holds.get(id, []), self.measured.get(id, {})

    def series(self, id: str, quantity: str) -> pd.DataFrame:
        """Return a recorded quantity, a row a run and a column a label; empty where it is not recorded."""
        frame = pd.DataFrame(self.measured.get(id, {}).get(quantity, {}))
        frame.columns = [_as_number(label) for label in frame.columns]
        return frame

    @cached_property
    def n_values(self) -> int:
        """How many numbers a run measures."""
        return sum(len(of) for quantities in self.measured.values() for of in quantities.values())


def file_of(notebook: str, dataset: str) -> Path:
    """Return where a notebook's evidence lies."""
    return FOLDER / dataset / f"{notebook}.json"


def read(notebook: str, dataset: str) -> Evidence | None:
    """Read a notebook's evidence on a dataset; None where none is recorded."""
    file = file_of(notebook, dataset)
    return Evidence(**json.loads(file.read_text())) if file.exists() else None


def quoted(notebook: str, dataset: str, parameters: Mapping[str, Any]) -> Evidence | None:
    """Return a notebook's evidence if a run with these parameters is one more of the recorded kind, else None."""
    recorded = read(notebook, dataset)
    return recorded if recorded and recorded.parameters == _plain(parameters) else None


def write(evidence: Evidence) -> Path:
    """Write evidence to its file, one quantity a line, and return the file."""
    content = dict(vars(evidence)) | {"measured": {}}
    lines = []
    for id, quantities in evidence.measured.items():
        rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(of)}" for name, of in quantities.items())
        lines.append(f"  {json.dumps(id)}: {{\n{rows}\n  }}")
    head = json.dumps({name: content[name] for name in Evidence.__dataclass_fields__ if name != "measured"}, indent=1)
    text = head.removesuffix("\n}") + ',\n "measured": {\n' + ",\n".join(lines) + "\n }\n}\n"
    file = file_of(evidence.notebook, evidence.dataset)
    write_atomically(file, text.encode())
    return file


def gather(folders: Iterable[Path], notebook: str) -> Evidence:
    """Join what one notebook filed in several run folders.

    Raises
    ------
    ValueError
        A folder has nothing of the notebook, or two runs differ in more than seed and machine.
    """
    filed = []
    for folder in folders:
        found = read_claims(folder).get(notebook)
        if not found:
            raise ValueError(f"{folder} has no claims of {notebook}")
        filed.append(found)
    first = filed[0]
    for other in filed[1:]:
        if _kind(other) != _kind(first):
            raise ValueError(f"runs of {notebook} differ in more than seed and machine: run them anew")
    claims = [{id: Claim.from_json(claim) for id, claim in each["claims"].items()} for each in filed]
    return Evidence(
        notebook,
        first["environment"]["dataset"],
        _plain(first["parameters"]),
        {name: first["environment"][name] for name in ("revision", "versions", "package", "source")},
        [{"seed": each["parameters"]["seed"], "precision": each["environment"]["precision"]} for each in filed],
        {id: [run[id].holds for run in claims] for id, claim in claims[0].items() if claim.holds is not None},
        {id: _joined([run[id] for run in claims]) for id in claims[0]},
    )


def _kind(filed: Mapping[str, Any]) -> Any:
    environment = filed["environment"]
    return _plain(filed["parameters"]), environment["dataset"], environment["package"], environment["source"]


def _joined(claims: Iterable[Claim]) -> dict[str, dict[str, list[float | None]]]:
    joined: dict[str, dict[str, list[float | None]]] = {}
    runs = [claim.measured | claim.series | claim.timings for claim in claims]
    for name, of in runs[0].items():
        joined[name] = {label: [_rounded(run.get(name, {}).get(label)) for run in runs] for label in of}
    return joined


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def unlike(evidence: Evidence, claims: Mapping[str, Claim], n_values: int) -> list[str]:
    """Hold a run's claims against the recorded runs, and return a line for each number or claim that is unlike them.

    A number must lie in the prediction interval of its recorded values, so wide that one check of ``n_values`` numbers
    raises a false alarm in one of a hundred runs. A claim that held in all recorded runs must hold. Times are left out.
    """
    lines = []
    for id, claim in claims.items():
        if all(evidence.holds.get(id, [])) and claim.holds is False:
            lines.append(f"{id} does not hold, and held in all {len(evidence.runs)} recorded runs: {claim.sentence}")
        for name, values in (claim.measured | claim.series).items():
            recorded = evidence.measured.get(id, {}).get(name, {})
            for label, value in values.items():
                known = [x for x in recorded.get(label, []) if x is not None]
                if value is None or len(known) < 2:
                    continue
                low, high = limits(known, n_values)
                if not low <= value <= high:
                    where = ": ".join(filter(None, (id, name, label)))
                    lines.append(f"{where} is {value:.6g}; expected {low:.6g} to {high:.6g}")
    return lines


def limits(values: list[float], n_values: int) -> tuple[float, float]:
    """Return where one more value lies, with a false alarm in one of a hundred checks of so many values.

    What is rounded to whole numbers, or to the digits that are recorded, may differ by that.
    """
    found = prediction_interval(values, 1 - FALSE_ALARMS / n_values)
    rounding = 1.0 if all(isinstance(x, int) for x in values) else 10.0**-DIGITS * abs(found.mean)
    return found.low - rounding, found.high + rounding


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in FREE}


def _as_number(label: str) -> float | str:
    try:
        return float(label)
    except ValueError:
        return label
