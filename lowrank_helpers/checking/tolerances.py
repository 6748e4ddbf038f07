"""Sets where each recorded number may lie, from many runs of the series, and writes what such a check is worth.

A *chain* is one run of the whole series from one seed in one precision. Another machine rounds otherwise, training is
chaotic, and so another machine is another seed: a number that it finds should lie in the prediction interval for one
more chain (Hahn & Meeker 1991, *Statistical Intervals*, section 4.8),

    mean ± t·s·√(1 + 1/n),

made of the chains' values of that number. The standard deviation s is pooled over the precisions, each about its own
mean, and the interval reaches from the lowest to the highest of their means, so that it holds for either. The level of
t divides one in a hundred among all numbers that vary (Bonferroni): a sound machine fails the whole check less often.
Most cells show means over ``WINDOW`` seeds, counted up from the chain's. Chains that begin fewer seeds apart share
networks, and the variance seen between them is 1 − ρ of that between independent ones, ρ being the mean correlation of
such means. So their share in s² is divided by it. For numbers of one network that is more than is needed.

Printing rounds: half a unit of the last printed place is added on either side.

Of a cell that fewer than ``LEAST_CHAINS`` have executed the words are checked and the numbers are free, as its metadata
then say.

A number that is the same in all chains may be so by luck, as an accuracy of 100.00 % or a rank of 512. Where no number
of its cell varies, it is exact if it is a whole number of at least ``COUNT``, and may move by one unit of its last
place if not. Where others do, it depends on training as they do, and may move by ``SLACK`` of itself, unless it is a
whole number above ``LARGEST_RANK``, such as a count of images. A number after ``±`` is the spread of a few seeds: it
may be anything up to ``SPREADS`` times the largest seen, or ``OF_MEAN`` of the number before it.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import nbformat
import numpy as np
from nbformat import NotebookNode
from scipy import stats

from lowrank_helpers.checking.comparison import (
    CHECKED,
    NUMBER,
    Intervals,
    Limits,
    compare_text,
    printed_value,
    texts,
    treatment,
    words,
)
from lowrank_helpers.data import PROJECT
from lowrank_helpers.series.execution import notebook_names, notebook_path
from lowrank_helpers.series.results import read_findings
from lowrank_helpers.series.store import write_atomically

FALSE_ALARM = 0.01  # of the whole check, on a sound machine
LEAST_CHAINS = 5  # that must have executed a cell for its numbers to have limits
FREE = f"fewer than {LEAST_CHAINS} chains have executed it"
WINDOW = 5  # seeds that a mean is over, as the notebooks' n_seeds
COUNT = 100
SLACK = 0.15
LARGEST_RANK = 1024
SPREADS = 5
OF_MEAN = 0.01
FACTORS = (1.5, 2, 5, 10)  # of an interval's half-width: how far the power study moves each number
TURNED = {"✓ met": "✗ **not met**", "larger": "smaller", "smaller": "larger", "the same": "larger"}
TABLE = PROJECT / "docs" / "tolerances.md"


class ChainsError(Exception):
    """The chains cannot give intervals; the message says why."""


@dataclass(frozen=True)
class Chain:
    """One run of the series: its folder, first seed, precision of products, and its cells by notebook and id."""

    name: str
    seed: int
    precision: str
    cells: Mapping[tuple[str, str], NotebookNode]


@dataclass(frozen=True)
class Passage:
    """One text of a recorded cell, and the same text as each chain shows it.

    Attributes
    ----------
    cell : (str, str)
        Notebook and id.
    place : str
        Output and kind of data, as in the cell's metadata.
    recorded : str
    values : array of float64, shape (chains, numbers)
        NaN where a chain has not executed the notebook, as where a sweep was cut short.
    """

    cell: tuple[str, str]
    place: str
    recorded: str
    values: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """Rows of the chains that have executed the cell."""
        return np.flatnonzero(np.isfinite(self.values).all(axis=1))

    @property
    def printed(self) -> list[str]:
        """The recorded numbers as printed."""
        return NUMBER.findall(self.recorded)


def read_chains(folders: Iterable[Path]) -> list[Chain]:
    """Read the executed notebooks of the points of sweeps, those of the series that are there.

    Raises
    ------
    ChainsError
        There are fewer than ``LEAST_CHAINS``.
    """
    chains = []
    points = [path for folder in folders for path in sorted((folder / "points").glob("*")) if any(path.glob("*.ipynb"))]
    for point in points:
        filed = read_findings(point).values()
        precisions = {of_notebook["environment"]["precision"] for of_notebook in filed}
        (seed,) = {of_notebook["parameters"]["seed"] for of_notebook in filed}
        cells = {
            (name, cell.id): cell
            for name in notebook_names()
            if (file := point / f"{name}.ipynb").exists()
            for cell in nbformat.read(file, as_version=4).cells
        }
        chains.append(Chain(f"{point.parent.parent.name} {point.name}", seed, ", ".join(sorted(precisions)), cells))
    if len(chains) < LEAST_CHAINS:
        raise ChainsError(f"there are {len(chains)} chains with executed notebooks; at least {LEAST_CHAINS} are needed")
    return chains


def passages(chains: Sequence[Chain]) -> tuple[list[Passage], list[str]]:
    """Collect the recorded texts that are checked number by number, with the chains' values.

    Returns
    -------
    list of Passage
    list of str
        A line for every cell whose words differ between the recording and a chain: such a cell cannot be checked.
    """
    found, worded = [], []
    for name in notebook_names():
        for cell in nbformat.read(notebook_path(name), as_version=4).cells:
            key = (name, cell.id)
            if cell.cell_type != "code" or not _has_limits(cell):
                continue
            others = {chain.name: dict(texts(chain.cells[key].outputs)) for chain in chains if key in chain.cells}
            for place, recorded in texts(cell.get("outputs", [])):
                turned = [chain for chain, shown in others.items() if words(shown.get(place, "")) != words(recorded)]
                if turned:
                    shown = others[turned[0]].get(place, "nothing")
                    worded.append(
                        f"{name}, {cell.id}: {turned[0]} and {len(turned) - 1} more say\n  {shown}\n  not\n  {recorded}"
                    )
                elif NUMBER.search(recorded):
                    values = np.full((len(chains), len(NUMBER.findall(recorded))), np.nan)
                    for row, chain in enumerate(chains):
                        if chain.name in others:
                            values[row] = list(map(_value, NUMBER.findall(others[chain.name][place])))
                    found.append(Passage(key, place, recorded, values))
    return found, worded


def _has_limits(cell: NotebookNode) -> bool:
    """Say whether a cell's numbers may differ from chain to chain, as far as its author said."""
    stated = cell.metadata.get("lowrank", {})
    return stated.get("unchecked_numbers") == FREE or (treatment(cell).extent == CHECKED and "exact" not in stated)


def _value(number: str) -> float:
    return float(printed_value(number))


def unit(printed: str) -> Decimal:
    """Return one unit of the last place of a number as printed: 0.01 for ``98.30``, 1 for ``1,024``."""
    return Decimal(1).scaleb(int(printed_value(printed).as_tuple().exponent))


def limits(printed: str, values: np.ndarray, precisions: Sequence[str], seeds: Sequence[int], level: float) -> Limits:
    """Return where a number may lie, or None for exactly as recorded.

    Parameters
    ----------
    printed : str
        The recorded number.
    values : array of shape (chains,)
        NaN of a chain that has no such number.
    precisions, seeds : sequences of str and of int
        Of each chain.
    level : float
        How rarely one more chain may fall outside.
    """
    recorded, step = printed_value(printed), unit(printed)
    there = np.isfinite(values)
    values, of, starts = values[there], np.array(precisions)[there], np.array(seeds)[there]
    if len(values) <= len(set(of)):  # no two of a precision: nothing is known of how it varies
        return None
    if np.ptp([*values, float(recorded)]) == 0:
        is_count = step >= 1 and abs(recorded) >= COUNT
        return None if is_count else _rounded(recorded - step, recorded + step, step)
    groups = {precision: values[of == precision] for precision in dict.fromkeys(of)}
    dof = len(values) - len(groups)
    squares = (
        ((group - group.mean()) ** 2).sum() / (1 - mean_correlation(starts[of == precision]))
        for precision, group in groups.items()
    )
    s = np.sqrt(sum(squares) / dof)
    t = stats.t.isf(level / 2, dof)
    reach = [(group.mean(), t * s * np.sqrt(1 + 1 / len(group))) for group in groups.values()]
    half = step / 2
    low = min(Decimal(str(mean - margin)) for mean, margin in reach) - half
    high = max(Decimal(str(mean + margin)) for mean, margin in reach) + half
    return _rounded(min(low, recorded - step), max(high, recorded + step), step)


def mean_correlation(starts: np.ndarray) -> float:
    """Return the mean correlation, over all pairs, of means over ``WINDOW`` seeds that begin at these."""
    if len(starts) < 2:
        return 0.0
    apart = np.abs(np.subtract.outer(starts, starts))[np.triu_indices(len(starts), k=1)]
    return float(np.clip(1 - apart / WINDOW, 0, None).mean())


def _rounded(low: Decimal, high: Decimal, step: Decimal) -> list[float]:
    """Round limits inwards to what can be printed."""
    ends = [
        (low / step).to_integral_value("ROUND_CEILING") * step,
        (high / step).to_integral_value("ROUND_FLOOR") * step,
    ]
    return [int(end) if step >= 1 else float(end) for end in ends]


def all_limits(
    found: Sequence[Passage], chains: Sequence[Chain], rows: Sequence[int], n_checked: int
) -> list[list[Limits]]:
    """Return the limits of all passages' numbers from the given chains, as one check of so many varying numbers."""
    level = FALSE_ALARM / max(1, n_checked)
    precisions, seeds = [chains[row].precision for row in rows], [chains[row].seed for row in rows]
    trained = {passage.cell for passage in found if _n_varying([passage])}
    made = []
    for passage in found:
        columns = passage.values[rows].T
        allowed = [
            limits(printed, column, precisions, seeds, level)
            for printed, column in zip(passage.printed, columns, strict=True)
        ]
        made.append(_loosened(passage, columns, allowed) if passage.cell in trained else allowed)
    return made


def _loosened(passage: Passage, columns: np.ndarray, allowed: Sequence[Limits]) -> list[Limits]:
    """Allow what varies too rarely for a few chains to show it: see the top of this module."""
    loosened = []
    before = 0.0
    for printed, between, values, within in zip(
        passage.printed, words(passage.recorded), columns, allowed, strict=False
    ):
        recorded, step = _value(printed), unit(printed)
        if between.endswith("±"):
            most = max(SPREADS * np.nanmax([*values, recorded]), OF_MEAN * abs(before))
            within = _rounded(Decimal(0), Decimal(str(max([most, *(within or [])]))), step)
        elif np.nanmax(values) == np.nanmin(values) == recorded and (step < 1 or abs(recorded) <= LARGEST_RANK):
            reach = max(Decimal(str(SLACK * abs(recorded))), step)
            within = _rounded(printed_value(printed) - reach, printed_value(printed) + reach, step)
        loosened.append(within)
        before = recorded
    return loosened


def _n_varying(found: Sequence[Passage]) -> int:
    """Count the numbers that differ between chains."""
    return sum(int((np.nanmax(p.values, axis=0) > np.nanmin(p.values, axis=0)).sum()) for p in found)


def _n_limits(name: str) -> int:
    """Count the numbers of a notebook that have limits."""
    cells = nbformat.read(notebook_path(name), as_version=4).cells
    intervals = [cell.metadata.get("lowrank", {}).get("intervals", {}) for cell in cells]
    return sum(within is not None for of_cell in intervals for allowed in of_cell.values() for within in allowed)


def false_alarms(found: Sequence[Passage], chains: Sequence[Chain], n_checked: int) -> list[int]:
    """Return for each chain how many of its numbers fall outside the limits that the others give."""
    n = len(chains)
    alarms = []
    for left_out in range(n):
        rows = [row for row in range(n) if row != left_out]
        made = all_limits(found, chains, rows, n_checked)
        outside = [
            not (within[0] <= value <= within[1] if within else value == _value(printed))
            for passage, allowed in zip(found, made, strict=True)
            for printed, value, within in zip(passage.printed, passage.values[left_out], allowed, strict=True)
            if np.isfinite(value)
        ]
        alarms.append(sum(outside))
    return alarms


def power(found: Sequence[Passage], made: Sequence[Sequence[Limits]]) -> dict[str, tuple[int, int]]:
    """Alter every number in turn, and every verdict, and count what the check catches.

    Returns
    -------
    dict
        By alteration: how many were caught, of how many.
    """
    caught: dict[str, tuple[int, int]] = {}
    for passage, allowed in zip(found, made, strict=True):
        for alteration, altered in _altered(passage, allowed):
            hits, tries = caught.get(alteration, (0, 0))
            caught[alteration] = (hits + bool(compare_text(passage.recorded, altered, allowed)), tries + 1)
    return caught


def _altered(passage: Passage, allowed: Sequence[Limits]) -> Iterator[tuple[str, str]]:
    """Yield texts with one number moved away from the middle of its limits, two digits swapped, or a verdict turned."""
    for match, within in zip(NUMBER.finditer(passage.recorded), allowed, strict=True):
        if within:
            middle, reach = (Decimal(str(sum(within))) / 2, Decimal(str(within[1] - within[0])) / 2)
            for factor, sign in itertools.product(FACTORS, (-1, 1)):
                moved = middle + sign * Decimal(str(factor)) * reach
                yield f"moved by {factor:g} half-widths", _replaced(passage.recorded, match, moved, unit(match[0]))
        for swapped in _swaps(match[0]):
            yield "two digits swapped", passage.recorded[: match.start()] + swapped + passage.recorded[match.end() :]
    for old, new in TURNED.items():
        if old in passage.recorded:
            yield "verdict turned", passage.recorded.replace(old, new, 1)


def _replaced(text: str, match: re.Match, value: Decimal, step: Decimal) -> str:
    number = value.quantize(step) if step < 1 else value.to_integral_value()
    return f"{text[: match.start()]}{number}{text[match.end() :]}"


def _swaps(number: str) -> Iterator[str]:
    """Yield a number with two unequal digits that stand side by side exchanged."""
    for i, (one, two) in enumerate(itertools.pairwise(number)):
        if one.isdigit() and two.isdigit() and one != two:
            yield number[:i] + two + one + number[i + 2 :]


def set_limits(folders: Iterable[Path]) -> list[str]:
    """Write the limits from the chains of sweeps into the cells' metadata, and what they are worth into the docs.

    A notebook that none of these chains has executed keeps the limits that others gave it.

    Returns
    -------
    list of str
        A line for every cell whose words differ between the recording and a chain; empty where all can be checked.

    Raises
    ------
    ChainsError
        There are too few chains.
    """
    chains = read_chains(folders)
    found, worded = passages(chains)
    executed = {name for chain in chains for name, _ in chain.cells}
    kept = {cell: row for cell, row in _rows_before().items() if cell[0] not in executed}
    untouched = {name for name, _ in kept}
    free = {passage.cell for passage in found if len(passage.seen) < LEAST_CHAINS} - kept.keys()
    found = [passage for passage in found if passage.cell not in free | kept.keys()]
    n_checked = _n_varying(found) + sum(map(_n_limits, untouched))
    made = all_limits(found, chains, range(len(chains)), n_checked)
    by_cell: dict[tuple[str, str], dict[str, Sequence[Limits]]] = {}
    for passage, allowed in zip(found, made, strict=True):
        if any(allowed):
            by_cell.setdefault(passage.cell, {})[passage.place] = allowed
    for name in sorted(set(notebook_names()) - untouched):
        _write_metadata(name, by_cell, free)
    write_atomically(TABLE, _report(chains, found, made, n_checked, len(free), kept).encode())
    return worded


def _write_metadata(name: str, by_cell: Mapping[tuple[str, str], Intervals], free: Collection[tuple[str, str]]) -> None:
    notebook = nbformat.read(notebook_path(name), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type != "code" or not _has_limits(cell):
            continue
        cell.metadata.pop("lowrank", None)
        if (name, cell.id) in by_cell:
            cell.metadata["lowrank"] = {"intervals": by_cell[name, cell.id]}
        elif (name, cell.id) in free:
            cell.metadata["lowrank"] = {"unchecked_numbers": FREE}
    write_atomically(notebook_path(name), (nbformat.writes(notebook) + "\n").encode())


def _rows_before() -> dict[tuple[str, str], str]:
    """Return the rows of the table as it is, by notebook and cell."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    cells = {line: [cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")}
    names = notebook_names()
    return {(row[1], row[2]): line for line, row in cells.items() if row[1] in names}


def _report(
    chains: Sequence[Chain],
    found: Sequence[Passage],
    made: Sequence[Sequence[Limits]],
    n_checked: int,
    n_free: int,
    kept: Mapping[tuple[str, str], str],
) -> str:
    precisions = [chain.precision for chain in chains]
    numbers = [within for allowed in made for within in allowed]
    counts = ", ".join(f"{precisions.count(precision)} in {precision}" for precision in dict.fromkeys(precisions))
    alarms = false_alarms(found, chains, n_checked)
    names = ", ".join(dict.fromkeys(name for name, _ in kept))
    earlier = [f"Limits of {names} are those of earlier chains, counted in the last table alone."] if kept else []
    lines = [
        "# Where recorded numbers may lie",
        "",
        f"Made by `lowrank tolerances` from {len(chains)} chains ({counts}), runs of the series with a seed each.",
        "How limits are made stands at the top of `lowrank_helpers/checking/tolerances.py`.",
        *earlier,
        "",
        f"- Numbers checked: {len(numbers):,}; with limits: {sum(map(bool, numbers)):,}; exactly as recorded: "
        f"{sum(within is None for within in numbers):,}. Cells marked exact or unchecked are not counted, nor the "
        f"{n_free} cells that fewer than {LEAST_CHAINS} chains have executed, whose words alone are checked.",
        f"- {n_checked:,} numbers vary between chains, earlier ones included. The whole check shall fail on a "
        f"sound machine less than once in {1 / FALSE_ALARM:.0f}, so each number less than once in "
        f"{n_checked / FALSE_ALARM:,.0f}.",
        f"- Leave one out: limits made from all other chains fail {sum(map(bool, alarms))} of {len(alarms)} chains "
        f"({', '.join(f'{chain.name}: {n} numbers' for chain, n in zip(chains, alarms, strict=True) if n) or 'none'}).",
        "",
        "## What the check would catch",
        "",
        "Each number of new outputs altered alone, from the middle of its limits; verdicts turned to their opposites.",
        "A digit altered in the *recorded* outputs is always caught: notebooks are recorded with a checksum of theirs.",
        "",
        "| alteration | caught | of |",
        "|---|---|---|",
        *(
            f"| {name} | {hits:,} ({hits / tries:.1%}) | {tries:,} |"
            for name, (hits, tries) in power(found, made).items()
        ),
        "",
        "## By cell",
        "",
        "The widest of a cell's limits, as a half-width in the numbers' unit and relative to the middle.",
        "",
        "| notebook | cell | numbers | exact | widest half-width | relative | chains |",
        "|---|---|---|---|---|---|---|",
        *sorted([*kept.values(), *_rows(found, made)], key=lambda row: row.split("|")[1]),
    ]
    return "\n".join(lines) + "\n"


def _rows(found: Sequence[Passage], made: Sequence[Sequence[Limits]]) -> Iterator[str]:
    pairs = zip(found, made, strict=True)
    for (notebook, id), group in itertools.groupby(pairs, key=lambda pair: pair[0].cell):
        of_cell = list(group)
        every = [within for _, allowed in of_cell for within in allowed]
        n_chains = int(np.isfinite(of_cell[0][0].values[:, 0]).sum())
        halves = [((high - low) / 2, abs(high + low) / 2) for low, high in filter(None, every)]
        widest = max((half for half, _ in halves), default=0)
        relative = max((half / middle for half, middle in halves if middle), default=0)
        shown = f"{widest:.3g} | {relative:.1%}" if halves else "– | –"
        yield f"| {notebook} | {id} | {len(every)} | {sum(within is None for within in every)} | {shown} | {n_chains} |"
