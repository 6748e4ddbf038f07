"""What a sweep found: one tidy table, and a page of figures with 95 % intervals over the seeds."""

import base64
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lowrank_helpers import plots
from lowrank_helpers.report import pages
from lowrank_helpers.report.index import environment, filed, stand_in
from lowrank_helpers.series.store import write_atomically
from lowrank_helpers.series.sweep import Point, Shown, Sweep, as_text
from lowrank_helpers.statistics import interval

COLUMNS = ("point", "notebook", "finding", "quantity", "value", "timed", "dataset", "device", "precision")
REPLICATES = "seed"  # the axis that intervals are over
DECADE = 10  # a numeric axis that spans more is logarithmic
PANEL = (6.4, 3.4)  # inches
CATEGORY_WIDTH = 0.6  # of the distance between two categories, over which the colours are spread
LABELS_FIT = 70  # letters of categories that fit under a figure
FILES = ("index.html", "table.csv", "table.parquet")


def write(folder: Path, sweep: Sweep, points: Sequence[Point], failed: Mapping[str, str]) -> None:
    """Write ``table.parquet``, ``table.csv`` and ``index.html`` from what the points of a sweep left in its folder.

    Parameters
    ----------
    points : sequence of Point
        As :func:`lowrank_helpers.series.sweep.points` returns them, which is the order of the table.
    failed : mapping of str to str
        Names of the points that failed, and why. The table holds what they had found by then.
    """
    gathered = {point.name: found for point in points if (found := _results(point.folder(folder)))}
    runs = [run for found in gathered.values() for run in filed(found["notebooks"])]
    findings = table(gathered)
    parquet = io.BytesIO()
    findings.to_parquet(parquet, index=False)
    write_atomically(folder / "table.parquet", parquet.getvalue())
    write_atomically(folder / "table.csv", findings.to_csv(index=False).encode())
    template = pages.environment().get_template("sweep.html.j2")
    shown = template.render(
        name=folder.name,
        conditions=_conditions(sweep, len(points), len(failed), runs),
        failed=failed,
        stand_in=stand_in(runs),
        chapters=_chapters(findings, sweep),
    )
    write_atomically(folder / "index.html", shown.encode())


def publish(folder: Path, target: Path) -> None:
    """Copy a sweep's page and table, but not its points, to a folder that is committed."""
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(folder / file, target / file)


def table(gathered: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a number of a finding, with the parameters of its notebook as columns.

    Parameters
    ----------
    gathered : mapping
        By point, what :func:`lowrank_helpers.series.results.gather` returned.

    Returns
    -------
    DataFrame
        ``quantity`` is the path to the number, such as ``effective.relu``; ``timed`` marks what no two runs agree on.
        Lists among the parameters are text, such as ``784-512-512-10``. ``data_dir`` is left out: it says where the
        data lay, not what they are.
    """
    rows = []
    for point, found in gathered.items():
        for id, finding in found["findings"].items():
            run = found["notebooks"][finding["notebook"]]
            given = {name: _cell(value) for name, value in run["parameters"].items() if name != "data_dir"}
            columns = given | {name: run["environment"][name] for name in ("dataset", "device", "precision")}
            rows += [
                {"point": point, "notebook": finding["notebook"], "finding": id, **number, **columns}
                for number in _numbers_of(finding)
            ]
    named = dict.fromkeys(itertools.chain(COLUMNS, *rows))
    return pd.DataFrame(rows, columns=list(named)).convert_dtypes().astype({"value": float, "timed": bool})


def _results(folder: Path) -> dict[str, Any] | None:
    """Return what a point found, or None of one that ended before it could say."""
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def _cell(value: Any) -> Any:
    return as_text(value) if isinstance(value, list) else value


def _numbers_of(finding: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if finding["met"] is not None:
        yield {"quantity": "met", "value": float(finding["met"]), "timed": False}
    for part, timed in (("values", False), ("timings", True)):
        for path, number in _numbers_in(finding[part]):
            yield {"quantity": ".".join(path), "value": number, "timed": timed}


def _numbers_in(value: Any) -> Iterator[tuple[list[str], float]]:
    """Yield every number in nested mappings and lists, after the path to it."""
    if isinstance(value, (int, float)):
        yield [], float(value)
    elif isinstance(value, (list, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            for path, number in _numbers_in(item):
                yield [str(key), *path], number


def intervals(values: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the mean of ``value`` for each combination of some columns, with Student's 95 % interval.

    Returns
    -------
    DataFrame
        The columns ``by``, ``mean``, ``n`` and ``margin``: the interval is mean ± margin; NaN where n is 1.
    """
    rows = []
    for case, group in values.groupby(list(by), sort=False)["value"]:
        found = interval(group)
        rows.append([*case, found.mean, found.n, found.half_width if found.n > 1 else math.nan])
    return pd.DataFrame(rows, columns=[*by, "mean", "n", "margin"])


def _conditions(sweep: Sweep, n_points: int, n_failed: int, runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Say what was swept and what the results were made on; where points differ, all that there is."""
    return {
        "Notebooks": ", ".join(sweep.notebooks) or "all",
        **{f"Swept: {name}": ", ".join(map(as_text, values)) for name, values in sweep.grid.items()},
        **{f"Fixed: {name}": as_text(value) for name, value in sweep.parameters.items()},
        "Points": f"{n_points}" + (f", {n_failed} failed" if n_failed else ""),
        "Dataset": environment(runs, "dataset"),
        "Device": environment(runs, "device"),
        "Matrix products in": environment(runs, "precision"),
        "Threads a kernel": environment(runs, "threads"),
        "Git revision": environment(runs, "revision"),
    }


def _chapters(findings: pd.DataFrame, sweep: Sweep) -> dict[str, list[dict[str, Any]]]:
    """Return, by finding, what the page shows of its numbers."""
    chapters: dict[str, list[dict[str, Any]]] = {}
    for shown in sweep.show or _all_numbers(findings):
        chapters.setdefault(shown.finding, []).append(_section(findings, shown, sweep))
    return chapters


def _all_numbers(findings: pd.DataFrame) -> list[Shown]:
    """Return what to show where the sweep does not say: every number of the assignment's items but times."""
    untimed = findings[~findings["timed"]]
    pairs = zip(untimed["finding"], untimed["quantity"], strict=True)
    items = [(finding, quantity.partition(".")[0]) for finding, quantity in pairs if "/" not in finding]
    return [Shown(*item) for item in dict.fromkeys(items)]


def _section(findings: pd.DataFrame, shown: Shown, sweep: Sweep) -> dict[str, Any]:
    """Return one figure of the page with its table, or, where no point found the number, its label alone."""
    label = shown.label or _words(shown.quantity)
    values = _values(findings, shown)
    if values.empty:
        return {"label": label}
    if shown.keys:
        values = values.rename(columns={"key": shown.keys})
    x = _horizontal(values, sweep, shown.keys)
    series = [name for name in (*sweep.grid, shown.keys or "key") if name in values and name not in (x, REPLICATES)]
    joined = values[series].astype(str).agg(", ".join, axis="columns") if series else ""
    summary = intervals(values.assign(series=joined), [x, "series"])
    with plots.style():
        png, width, height = plots.drawn(_figure(summary, x, label))
    return {
        "label": label,
        "source": f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "width": width,
        "height": height,
        "alt": f"{label} by {' and '.join(filter(None, map(_words, [x, *series]))) or 'case'}: means from "
        f"{summary['mean'].min():.4g} to {summary['mean'].max():.4g}; the table below has all.",
        "caption": _caption(summary["n"].min(), summary["n"].max()),
        "x": _words(x),
        "series": ", ".join(map(_words, series)),
        "has_series": bool(series),
        "rows": summary.rename(columns={x: "x"}).to_dict("records"),
    }


def _caption(least: int, most: int) -> str:
    if most == 1:
        return "One seed: there is no interval."
    n = f"{least}" if least == most else f"{least} to {most}"
    return f"Mean and 95 % interval (Student's t) over n = {n} seeds."


def _values(findings: pd.DataFrame, shown: Shown) -> pd.DataFrame:
    """Return the rows to draw: with a column ``key`` if the quantity is a mapping, without other notebooks' columns."""
    rows = findings[findings["finding"] == shown.finding]
    path = rows["quantity"].str.removeprefix(shown.quantity)
    values = rows[path.ne(rows["quantity"]) & (path.eq("") | path.str.startswith("."))]
    keys = path[values.index].str.removeprefix(".").mask(lambda key: key.eq(""))
    numbers = pd.to_numeric(keys, errors="coerce")
    values = values.assign(key=keys if numbers.isna().any() else numbers)
    if shown.per:
        whole = rows[rows["quantity"] == shown.per].set_index("point")["value"]
        values = values.assign(value=values["value"] / values["point"].map(whole))
    return values.dropna(subset="value").dropna(axis="columns", how="all")


def _horizontal(values: pd.DataFrame, sweep: Sweep, keys: str) -> str:
    """Choose the column for the horizontal axis: of the grid if it has one but the seed, else of the quantity."""
    axes = [name for name in (*sweep.grid, keys or "key", "dataset") if name in values and name != REPLICATES]
    return axes[0]


def _figure(summary: pd.DataFrame, x: str, label: str) -> Figure:
    """Draw means with their intervals: along a scale if x is a number, else by category; a colour a series."""
    numeric = pd.api.types.is_numeric_dtype(summary[x])
    ticks = list(summary[x].drop_duplicates())
    groups = list(summary.groupby("series", sort=False))
    figure, axes = plots.panels(panel=PANEL)
    for i, (colour, (name, group)) in enumerate(zip(itertools.cycle(plots.PALETTE), groups, strict=False)):
        beside = CATEGORY_WIDTH * ((i + 0.5) / len(groups) - 0.5)  # so that no interval hides another
        places = group[x] if numeric else group[x].map(ticks.index) + beside
        style = {"fmt": "o-" if numeric else "o", "color": colour, "capsize": 3, "markersize": 4}
        axes.errorbar(places.astype(float), group["mean"], yerr=group["margin"], label=name, **style)
    if numeric:
        axes.set_xscale("log" if 0 < DECADE * min(ticks) < max(ticks) else "linear")
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(ticks)), labels=ticks, rotation=20 if len("".join(ticks)) > LABELS_FIT else 0)
    axes.set(xlabel=_words(x), ylabel=label)
    if len(groups) > 1:
        figure.legend(loc="outside right upper")
    return figure


def _words(name: str) -> str:
    """Write a column's name for readers; ``key`` is no word that a mapping's keys need."""
    return "" if name == "key" else name.replace("_", " ")
