"""Run notebooks from many seeds, and write what they measure into evidence/: ``make evidence``.

``python scripts/evidence.py 03_rank --seeds 21..30`` runs some, with those that they read. The runs lie in
reports/sweeps/evidence-DATASET/, a folder a seed. Runs that lie there from the same code are kept, so a stopped command
goes on where it was, and the runs of further seeds are added to the evidence.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lowrank_helpers import PROJECT, cli
from lowrank_helpers.series import evidence, execution, sweep
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.evidence import CODE, FREE, Evidence, code_of, kind_of, source_of
from lowrank_helpers.series.parameters import ParameterError, declared
from lowrank_helpers.series.results import read_claims

DIGITS = 5  # of a recorded number


def points_of(names: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any]) -> dict[str, execution.Planned]:
    """Return the runs that make evidence of notebooks and of those that they read, one a seed.

    Odd seeds multiply in float32, and even ones in what is fastest here, unless a precision is given: where bfloat16
    is, evidence is of both.
    """
    allowed = [name for name in FREE if name != "seed"]
    if wrong := given.keys() - {*allowed}:
        said = f"allowed: {', '.join(allowed)}"
        raise ParameterError(f"parameter {min(wrong)!r} is not allowed where evidence is recorded; {said}")
    points = sweep.points(sweep.Sweep(execution.with_what_they_read(names), {"seed": seeds}, given))
    for planned in points.values():
        for given in planned.values():
            given.setdefault("precision", "float32" if given["seed"] % 2 else "auto")
    return points


def gather(folders: Iterable[Path], notebook: str) -> Evidence | None:
    """Join what a notebook filed in several run folders, one a seed; None where no folder has a run of this kind.

    Runs count that went to their end, under today's code, with the notebook's own parameters (but for those in
    ``FREE``). So evidence grows when runs of further seeds are added to the folders.
    """
    whole = [folder for folder in folders if (folder / f"{notebook}.ipynb").exists()]
    filed = [found for folder in whole if (found := read_claims(folder).get(notebook))]
    kind, code = kind_of(declared(source_of(notebook))), code_of(notebook)
    runs = [run for run in filed if kind_of(run["parameters"]) == kind and code.items() <= run["environment"].items()]
    if not runs:
        return None
    runs.sort(key=lambda run: run["parameters"]["seed"])
    claims = [run["claims"] for run in runs]
    newest = max((run["environment"] for run in runs), key=lambda environment: environment["started"])
    return Evidence(
        notebook,
        newest["dataset"],
        kind,
        {name: newest[name] for name in ("revision", "versions", *CODE)},
        [{"seed": run["parameters"]["seed"], "precision": run["environment"]["precision"]} for run in runs],
        {id: [bool(run[id].holds) for run in claims] for id, claim in claims[0].items() if claim.holds is not None},
        {id: _joined([run[id] for run in claims]) for id in claims[0]},
    )


def _joined(claims: Sequence[Claim]) -> dict[str, dict[str, list[float | None]]]:
    """Return what runs measured for one claim: by quantity and label one value a run."""
    joined: dict[str, dict[str, list[float | None]]] = {}
    for i, claim in enumerate(claims):
        for name, values in (claim.measured | claim.series | claim.timings).items():
            for label, value in values.items():
                rounded = float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
                joined.setdefault(name, {}).setdefault(label, [None] * len(claims))[i] = rounded
    return joined


@click.command(cls=cli.Command)
@cli.NOTEBOOKS
@cli.GIVEN
@click.option(
    "--seeds",
    default="1..20",  # the notebooks show seed 0
    show_default=True,
    help="One run each: 1..20, or 3,5. Odd seeds run in float32, even ones in what is fastest; -p precision overrides.",
)
@cli.WORKERS
@cli.SCHEDULER
def main(notebooks: cli.Names, pairs: cli.Pairs, seeds: str, **where: Any) -> None:
    """Record evidence of NOTEBOOKS, or of all."""
    points = points_of(notebooks, sweep.grid_axis(f"seed={seeds}")[1], cli.parameters_from(pairs))
    planned = next(iter(points.values()))
    dataset = execution.settle_dataset(planned)

    def write(folder: Path, failed: dict[str, str]) -> str:
        for name in planned:
            if found := gather(sorted((folder / "points").iterdir()), name):
                click.echo(f"{os.path.relpath(evidence.write(found))}: {len(found.runs)} runs")
        return "`make record` shows the claims of notebooks beside it."

    folder = PROJECT / "reports" / "sweeps" / f"evidence-{dataset}"
    click.echo(f"Runs lie in {os.path.relpath(folder)}. If this is stopped, the same command goes on.")
    cli.run_points(points, folder, write, resume=True, **where)


if __name__ == "__main__":
    main()
