"""What the matrices of somebody's own network measure: a table for the terminal, and a page with ``results.json``."""

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_helpers.analysis import BEYOND, Analysis

HALF = ("float16", "bfloat16")
WIDTH = 100  # columns of the terminal
NAMED = 4  # tensors that are named where others share their reason; --output names all
DRAWN = ("effective rank", "energy rank 90 %", BEYOND)
ALT = "Three measures of rank as shares of the full rank, by matrix; the table below has the numbers."
NUMBERS: dict[str, Any] = {"float_format": "{:.1f}".format}  # of tables
COLUMNS = {
    "effective rank": "effective",
    "stable rank": "stable",
    "energy rank 90 %": "90 %",
    "energy rank 95 %": "95 %",
    "energy rank 99 %": "99 %",
    "Gavish–Donoho rank": "GD",
    BEYOND: "MP",
}
MEANING = {
    "rank": "numerical rank of the full one, min(rows, columns): singular values above rounding",
    "effective": "exp of the entropy of the singular values (Roy & Vetterli 2007)",
    "stable": "‖A‖_F²/σ₁² (Rudelson & Vershynin 2007)",
    "90 %, 95 %, 99 %": "directions that hold this share of the squared singular values",
    "GD": "directions above Gavish & Donoho's threshold for unknown noise (2014)",
    "MP": "directions beyond the Marchenko–Pastur edge of a random matrix of the same spread",
    "saves": "share of the parameters that factors at the effective rank save; – if they cost more",
}


def answer(analysis: Analysis) -> tuple[str, str]:
    """Return one plain sentence on what was measured, and its evidence."""
    table, n_parameters, n_saved = analysis.table, analysis.n_parameters, analysis.n_saved
    gaining = int((table["saved"] > 0).sum())
    if gaining:
        plain = f"Factors at the effective rank would save {_percent(n_saved / n_parameters)} of the parameters."
        evidence = f"They pay in {gaining} of {len(table)} matrices: {n_saved:,} of {n_parameters:,} are saved."
    else:
        plain = "Factors at the effective rank would save nothing."
        evidence = f"Each of the {len(table)} matrices, {n_parameters:,} parameters, would cost more as two factors."
    share = _percent((table["effective rank"] / _full(table)).mean())
    return plain, (
        f"{evidence} On average over the matrices, the effective rank is {share} of the full one. "
        "What such factors cost in accuracy is not measured here."
    )


def notes(analysis: Analysis, named: int | None = None) -> list[str]:
    """Say what must be known to read these numbers right, naming at most so many tensors that share a remark."""
    table = analysis.table
    said = []
    for label, reasons in (("Of note", dict(table["remark"])), ("Not measured", analysis.skipped)):
        for reason in filter(None, dict.fromkeys(reasons.values())):
            names = [name for name, why in reasons.items() if why == reason]
            more = f", and {len(names) - named} more (--output names all)" if named and len(names) > named else ""
            said.append(f"{label}, {reason}: {', '.join(names[:named])}{more}")
    if (table["Gavish–Donoho rank"] == 0).any():
        said.append(
            "Gavish–Donoho 0 means that no direction stands above what noise as strong as the matrix's median "
            "direction would give; it does not mean that the matrix is zero."
        )
    if table["dtype"].isin(HALF).any():
        said.append(
            "Of half-precision entries, the numerical rank counts the directions above ε/2·‖A‖_F, the most that "
            "rounding to that precision can have made."
        )
    if table["unfolded"].str.contains("·").any():
        said.append(
            "A convolution is unfolded as out × in·height·width. Its tensor does not tell groups, nor transposition: "
            "a file's are unfolded as plain ones, first axis against the rest; a callable's as what they are."
        )
    return said


def text(analysis: Analysis) -> str:
    """Return the table and all that goes with it for a terminal of 100 columns, the answer last."""
    shown = _shown(analysis.table)
    unnamed = shown.set_axis([""] * len(shown))
    room = WIDTH - len(unnamed.to_string(**NUMBERS).partition("\n")[0])
    shown.index = pd.Index(name if len(name) <= room else "…" + name[1 - room :] for name in shown.index)
    return "\n".join(
        [
            shown.to_string(**NUMBERS),
            "",
            *(_wrapped(f"{name:17} {meaning}", indent=18) for name, meaning in MEANING.items()),
            "",
            *(_wrapped(f"- {line}", indent=2) for line in notes(analysis, NAMED)),
            "",
            _wrapped(" ".join(answer(analysis))),
        ]
    )


def _wrapped(line: str, indent: int = 0) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * indent)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that are shown, under their short names."""
    first = {
        "unfolded": table["unfolded"],
        "rank": table["numerical rank"].astype(str) + "/" + _full(table).astype(str),
    }
    saves = (table["saved"] / table["parameters"]).map(lambda share: _percent(share) if share else "–")
    return pd.DataFrame({**first, **{short: table[name] for name, short in COLUMNS.items()}, "saves": saves})


def _full(table: pd.DataFrame) -> pd.Series:
    """Return the full ranks, min(rows, columns)."""
    return table[["rows", "columns"]].min(axis=1)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def write(folder: Path, analysis: Analysis) -> None:
    """Write ``index.html`` and ``results.json``."""
    from lowrank_helpers.report import pages  # here: it takes seconds to import, which the table need not wait for

    table = analysis.table
    plain, evidence = answer(analysis)
    results = {
        "source": analysis.source,
        "answer": plain,
        "evidence": evidence,
        "parameters": analysis.n_parameters,
        "saved": analysis.n_saved,
        "matrices": table.to_dict(orient="index"),
        "skipped": analysis.skipped,
    }
    conditions = {
        "Network": analysis.source,
        "Matrices": f"{len(table):,}",
        "Parameters in them": f"{analysis.n_parameters:,}",
        "Stored as": ", ".join(table["dtype"].unique()),
        "Not measured": f"{len(analysis.skipped):,} tensors",
    }
    pages.write_network(
        folder,
        results,
        conditions,
        title=f"How low-rank is {Path(analysis.source).name}?",
        lead="Every matrix of a network by every measure of rank.",
        answer=plain,
        evidence=evidence,
        figure=pages.picture(*_figure(table), ALT),
        rows="Matrices",
        table=_shown(table).to_html(**NUMBERS),
        meaning=MEANING,
        notes=notes(analysis),
    )


def _figure(table: pd.DataFrame) -> tuple[bytes, int, int]:
    """Draw ranks as shares of the full one, a place a matrix in the network's order."""
    from lowrank_helpers import plots

    plots.use_style()
    figure, axes = plots.panels(panel=(8.4, 3.4))
    for name, marker in zip(DRAWN, "os^", strict=True):
        axes.plot(range(1, len(table) + 1), 100 * table[name] / _full(table), marker, markersize=4, label=name)
    axes.set(xlabel="matrix, in the network's order", ylabel="share of the full rank (%)", ylim=(0, 102))
    figure.legend(loc="outside upper center", ncols=len(DRAWN))
    return plots.drawn(figure)
