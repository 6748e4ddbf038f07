"""What a sweep found: one tidy table, and a page of figures with 95 % intervals over the seeds."""

import itertools
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lowrank_helpers import plots
from lowrank_helpers.report import pages
from lowrank_helpers.report.index import conditions, stand_in
from lowrank_helpers.series.results import read_claims
from lowrank_helpers.series.store import write_atomically
from lowrank_helpers.series.sweep import Sweep, as_text, folder_of
from lowrank_helpers.statistics import interval

COLUMNS = ("point", "notebook", "claim", "kind", "quantity", "label", "value", "dataset", "device", "precision")
REPLICATES = "seed"  # the axis that intervals are over


def write(folder: Path, sweep: Sweep, points: Sequence[str], failed: Mapping[str, str]) -> None:
    """Write ``table.csv`` and ``index.html`` from what the points of a sweep, in this order, left in its folder.

    Of points that ``failed`` the page says why, and the table holds what they had found by then.
    """
    gathered = {point: read_claims(folder_of(point, folder)) for point in points}
    runs = [run for found in gathered.values() for run in found.values()]
    numbers = table(gathered)
    write_atomically(folder / "table.csv", numbers.to_csv(index=False).encode())
    swept = {
        "Notebooks": ", ".join(sweep.notebooks) or "all",
        **{f"Swept: {name}": ", ".join(map(as_text, values)) for name, values in sweep.grid.items()},
        **{f"Fixed: {name}": as_text(value) for name, value in sweep.parameters.items()},
        "Points": f"{len(points)}, {len(failed)} failed" if failed else str(len(points)),
    }
    pages.write_index(
        folder,
        "sweep",
        name=folder.name,
        conditions=swept | conditions(runs),
        failed=failed,
        stand_in=stand_in(runs),
        chapters=_chapters(numbers, runs, sweep),
    )


def table(gathered: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a number of a claim, with the parameters of its notebook as columns.

    Parameters
    ----------
    gathered : mapping
        By point, what :func:`lowrank_helpers.series.results.read_claims` returned.

    Returns
    -------
    DataFrame
        ``kind`` is ``measured``, ``series`` or ``timings``, on which no two runs agree. Lists among the parameters are
        text, such as ``784-512-512-10``. ``data_dir`` is left out: it says where the data lay, not what they are.
    """
    rows = []
    for point, name, run in ((point, name, run) for point, found in gathered.items() for name, run in found.items()):
        given = {parameter: value for parameter, value in run["parameters"].items() if parameter != "data_dir"}
        given |= {condition: run["environment"][condition] for condition in ("dataset", "device", "precision")}
        given |= {"point": point, "notebook": name}
        rows += [
            given | {"claim": claim.id, "kind": kind, "quantity": quantity, "label": label or None, "value": value}
            for claim in run["claims"].values()
            for kind in ("measured", "series", "timings")
            for quantity, values in getattr(claim, kind).items()
            for label, value in values.items()
        ]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys(itertools.chain(COLUMNS, *rows))))
    texts = frame.map(lambda x: as_text(x) if isinstance(x, (list, dict)) else x)
    return texts.convert_dtypes().astype({"label": "string", "value": float})


def _chapters(numbers: pd.DataFrame, runs: Sequence[Mapping[str, Any]], sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Return, by item, its claim's sentence, at how many points it holds, and the figures of what it measured."""
    items = numbers[numbers["kind"].eq("measured") & ~numbers["claim"].str.contains("/")].dropna(subset="value")
    chapters = {}
    for id in items["claim"].unique():
        claims = [run["claims"][id] for run in runs if id in run["claims"]]
        of_item = items[items["claim"].eq(id)]
        chapters[id] = {
            "sentence": claims[0].sentence,
            "holds": [claim.holds for claim in claims if claim.holds is not None],
            "sections": [
                _section(str(name), values, sweep) for name, values in of_item.groupby("quantity", sort=False)
            ],
        }
    return chapters


def _section(title: str, values: pd.DataFrame, sweep: Sweep) -> dict[str, Any]:
    """Return one figure of the page with its table."""
    axes = [name for name in sweep.grid if name != REPLICATES and name in values and values[name].notna().any()]
    axes += ["label"] if len(set(values["label"])) > 1 else []
    x, *others = axes or ["dataset"]
    colours = values[others].astype(str).agg(", ".join, axis="columns") if others else None
    plots.use_style()
    drawn = plots.drawn(_figure(values[x], values["value"], colours, title))
    alt = f"Means with 95 % intervals of {title}; the table below has the numbers."
    return {
        "title": title,
        "figure": pages.picture(*drawn, alt),
        "head": [*map(_words, (x, *others))],
        "rows": [(case, interval(group)) for case, group in values.groupby([x, *others], sort=False)["value"]],
    }


def _figure(x: pd.Series, values: pd.Series, colours: pd.Series | None, title: str) -> Figure:
    """Draw means with Student's intervals: along a scale if x is a number, else by category."""
    numeric = pd.api.types.is_numeric_dtype(x)
    figure, ax = plots.panels(panel=(6.4, 3.4))
    style = {"linestyle": "-", "native_scale": True} if numeric else {"linestyle": "none", "dodge": colours is not None}
    limits = attrgetter("low", "high")  # of one value they are infinite, and not drawn
    marks = {"errorbar": lambda case: limits(interval(case)), "markersize": 4, "linewidth": 1.5}
    sns.pointplot(x=x, y=values, hue=colours, ax=ax, **marks, **style)
    if numeric and 0 < 10 * x.min() < x.max():  # more than a decade
        ax.set_xscale("log")
    ax.set(xlabel=_words(str(x.name)), ylabel="", title=title)
    ax.tick_params("x", rotation=0 if numeric else 20)
    if colours is not None:
        sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return figure


def _words(column: str) -> str:
    return "" if column == "label" else column.replace("_", " ")
