"""What ``compress`` did to somebody's own network: a page with ``results.json``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from lowrank_helpers.compression import Change, Report

N_BUDGETS = 12  # of the curve
ALT = "What budgets of parameters cost, with the knee and this budget marked."
MEANING = {
    "knee": "the budget farthest from the line between the ends of the curve (Satopää et al. 2011): below it, each "
    "parameter saved costs more",
    "predicted": "relative change of the outputs to first order, √(E‖change‖² / E‖outputs‖²)",
    "measured": "the same of the network returned, on inputs that fitted nothing",
}


def knee(frontier: Mapping[float, float]) -> float:
    """Return the share whose cost is farthest from the line between the ends (Satopää et al. 2011).

    The shares rise.
    """
    share, cost = np.array(list(frontier.items())).T
    line = np.interp(share, share[[0, -1]], cost[[0, -1]])
    return float(share[np.abs(cost - line).argmax()])


def write(folder: Path, source: str, report: Report) -> None:
    """Write ``index.html`` and ``results.json``."""
    from lowrank_helpers.report import pages  # here: it takes seconds to import, which a refusal need not wait for

    at = knee(report.frontier)
    changes = {name: change for name, change in vars(report).items() if isinstance(change, Change)}
    fitted = [report.fallbacks.get(name, "the model's outputs") for name in report.ranks]
    table = pd.DataFrame({"rank": report.ranks.values(), "factors fit": fitted}, index=list(report.ranks))
    pages.write_network(
        folder,
        {"source": source, "verdict": report.verdict, "knee": at, **asdict(report)},
        {"Network": source} | {name.capitalize(): str(change) for name, change in changes.items()},
        title=f"{Path(source).name}, compressed",
        lead="Layers of a network became two thin ones each.",
        answer=report.verdict,
        evidence=f"The outputs change by {report.measured_error:.3g}, measured; {report.error:.3g} was predicted. "
        f"The curve has its knee at {at:.0%} of the parameters.",
        figure=pages.picture(*_figure(at, report), ALT),
        rows="Layers",
        table=table.to_html(),
        meaning=MEANING,
        notes=[f"{name} stays dense: {reason}." for name, reason in report.left_alone.items()],
    )


def _figure(at: float, report: Report) -> tuple[bytes, int, int]:
    from lowrank_helpers import plots

    plots.use_style()
    figure, ax = plots.panels(panel=(6, 3.4))
    ax.plot([100 * share for share in report.frontier], report.frontier.values(), "o-", markersize=4)
    ax.axvline(100 * at, color=plots.PALETTE[1], linestyle="--", label="knee")
    ax.axvline(100 * report.parameters.share, color="black", linestyle=":", label="this budget")
    ax.set(xlabel="share of the parameters (%)", ylabel="score" if report.score else "relative change of the outputs")
    ax.legend()
    return plots.drawn(figure)
