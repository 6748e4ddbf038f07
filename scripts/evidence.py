"""Run notebooks from many seeds, and write what they measure into evidence/: ``make evidence``.

``python scripts/evidence.py 03_rank --seeds 21..30`` runs some, with those that they read. The runs lie in
reports/sweeps/evidence-DATASET/, a folder a seed. Runs that lie there from the same code are kept, so a stopped command
goes on where it was, and the runs of further seeds are added to the evidence.
"""

import os
from pathlib import Path
from typing import Any

import click

from lowrank_helpers import PROJECT, cli
from lowrank_helpers.series import evidence, execution, sweep


@click.command(cls=cli.Command)
@cli.NOTEBOOKS
@cli.GIVEN
@click.option(
    "--seeds",
    default=f"{evidence.SEEDS[0]}..{evidence.SEEDS[-1]}",
    show_default=True,
    help="One run each: 1..20, or 3,5. Odd seeds run in float32, even ones in what is fastest; -p precision overrides.",
)
@cli.WORKERS
@cli.SCHEDULER
def main(notebooks: cli.Names, pairs: cli.Pairs, seeds: str, **where: Any) -> None:
    """Record evidence of NOTEBOOKS, or of all."""
    points = evidence.points(notebooks, sweep.grid_values(seeds), cli.parameters_from(pairs))
    dataset = execution.settle_dataset(points[0].planned)

    def gather(folder: Path, failed: dict[str, str]) -> str:
        for name in points[0].planned:
            if found := evidence.gather(sorted((folder / "points").iterdir()), name):
                click.echo(f"{os.path.relpath(evidence.write(found))}: {len(found.runs)} runs")
        return "`make record` shows the claims of notebooks beside it."

    folder = PROJECT / "reports" / "sweeps" / f"evidence-{dataset}"
    cli.run_points(points, folder, gather, resume=True, **where)


if __name__ == "__main__":
    main()
