"""Claims: a sentence that a person wrote, a test of what a run measured, and what the recorded runs say of it.

There are two kinds. What must hold in a run is counted over the recorded runs. What holds on average, and is smaller
than the luck of one run, is decided by paired differences over the recorded runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_helpers.series import counts
from lowrank_helpers.statistics import relative_difference

Quantities = dict[str, dict[str, float | None]]  # by name and label; the label is empty where there is one number
Recorded = Mapping[str, Mapping[str, Sequence[float | None]]]  # the same, with one value a recorded run


@dataclass(frozen=True)
class Comparison:
    """A statement about two labels of one quantity, which the recorded runs decide.

    The ``relation`` of the first to the second is ``larger``, ``smaller`` or ``alike``. ``counts`` is the least
    relative difference that matters.
    """

    quantity: str
    first: str
    second: str
    relation: str
    counts: float


@dataclass(frozen=True)
class Claim:
    """A sentence and what this run measured: :meth:`lowrank_helpers.series.run.Run.claim` says what each field means.

    ``holds`` is None for a claim that only several runs decide; its ``comparisons`` say what must hold on average.
    """

    id: str
    sentence: str
    holds: bool | None
    comparisons: list[Comparison] = field(default_factory=list)
    measured: Quantities = field(default_factory=dict)
    series: Quantities = field(default_factory=dict)
    timings: Quantities = field(default_factory=dict)

    @classmethod
    def from_json(cls, filed: Mapping[str, Any]) -> "Claim":
        """Return the claim that :func:`dataclasses.asdict` made a mapping of; ``results.json`` adds the notebook."""
        given = {name: value for name, value in filed.items() if name != "notebook"}
        return cls(**given | {"comparisons": [Comparison(**each) for each in filed["comparisons"]]})


@dataclass(frozen=True)
class Verdict:
    """What the recorded runs say of a claim, in a sentence and in few words; ``settled`` is None without such runs."""

    settled: bool | None
    text: str
    short: str


def quantities(values: Mapping[str, Any]) -> Quantities:
    """Return measured values by name and label; numbers that are not finite become None, as JSON knows none.

    Raises
    ------
    TypeError
        A value is neither a number nor a mapping of numbers.
    """
    named = {name: value if isinstance(value, Mapping) else {"": value} for name, value in values.items()}
    return {name: {str(label): _number(name, x) for label, x in of.items()} for name, of in named.items()}


def _number(name: str, given: Any) -> float | None:
    value = getattr(given, "item", lambda: given)()
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"measured {name!r} has {value!r}; allowed: a number, or a mapping of labels to numbers")
    return value if math.isfinite(value) else None


def verdict(claim: Claim, holds: Sequence[bool], recorded: Recorded) -> Verdict:
    """Say how a claim stands, by whether it ``holds`` in each recorded run, or by what these measured.

    Both are empty where no run with this run's parameters is recorded.
    """
    if claim.comparisons:
        return _average(claim, recorded)
    if not holds:
        text = f"It {'holds' if claim.holds else 'does **not** hold'} in this run; no runs like it are recorded."
        return Verdict(None, text, "holds in this run" if claim.holds else "does not hold in this run")
    here = "and in this one" if claim.holds else "and **not** in this one"
    counted = f"olds in {sum(holds)} of {len(holds)} recorded runs, {here}."
    short = f"{sum(holds)} of {len(holds)} runs"
    if sum(holds) >= counts.SETTLED * len(holds):
        return Verdict(True, f"H{counted}", short)
    return Verdict(False, f"**Not settled:** it h{counted}", f"not settled: {short}")


def _average(claim: Claim, recorded: Recorded) -> Verdict:
    found = []
    for each in claim.comparisons:
        values = recorded.get(each.quantity, {})
        if not {each.first, each.second} <= values.keys():
            text = "Several runs decide this claim; none like this one are recorded."
            return Verdict(None, text, "one run cannot tell")
        found.append((each, relative_difference(values[each.first], values[each.second], margin=each.counts)))
    settled = all(difference.verdict == each.relation for each, difference in found)
    said = "; ".join(
        f"{each.quantity}, {each.first} against {each.second}: {difference} ({difference.verdict})"
        for each, difference in found
    )
    n = min(difference.n for _, difference in found)
    word = "Settled" if settled else "**Not settled**"
    how = f"{word} by the mean of {n} recorded runs and its 95 % interval, as shares of the mean of both numbers"
    text = f"{how}. {said[0].upper()}{said[1:]}."
    return Verdict(settled, text, f"{'settled' if settled else 'not settled'} by the mean of {n} runs")


def markdown(claim: Claim, holds: Sequence[bool], recorded: Recorded) -> str:
    """Write a claim with its evidence: the sentence, how it stands, and a table of this run and the recorded ones."""
    parts = f"> **{claim.id}** {claim.sentence}", verdict(claim, holds, recorded).text, table(claim, recorded)
    return "\n\n".join(filter(None, parts))


def table(claim: Claim, recorded: Recorded) -> str:
    """Return a claim's measured quantities and times as a Markdown table, or nothing where it has none."""
    shown = claim.measured | claim.timings
    if not shown:
        return ""
    head = "| | this run | recorded runs |\n|---|--:|--:|" if recorded else "| | this run |\n|---|--:|"
    rows = []
    for name, values in shown.items():
        for label, value in values.items():
            others = [x for x in recorded.get(name, {}).get(label, []) if x is not None]
            cells = [": ".join(filter(None, (name, label))), _written(value, value)]
            cells += [_spread(others)] if recorded else []
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *rows])


def _spread(values: Sequence[float]) -> str:
    """Write the mean and the standard deviation of recorded values, the least and the most."""
    if not values:
        return "–"
    mean = float(np.mean(values))
    if min(values) == max(values):
        return f"{_written(mean, mean)} in all"
    parts = [_written(x, mean) for x in (mean, float(np.std(values, ddof=1)), min(values), max(values))]
    return "{} ± {} ({} to {})".format(*parts)


def _written(value: float | None, scale: float | None) -> str:
    """Write a number with about four digits of one of this scale; a whole number as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    digits = 3 - math.floor(math.log10(abs(scale))) if scale else 2
    return f"{value:,.{min(max(digits, 0), 6)}f}"
