"""What would the check notice? Break an experiment, run it, and hold what it claims against the evidence.

``python scripts/power.py 02_train -p dataset digits`` runs a notebook unbroken and with each fault, from seeds that the
evidence has not seen, and prints in how many runs the check notices, and by what. The last line counts false
alarms: recorded runs, in reports/sweeps/, that are unlike the others.
"""

import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import click
import nbformat

from evidence import gather  # in this folder
from lowrank_helpers import PROJECT, cli
from lowrank_helpers.series import evidence, execution, results
from lowrank_helpers.series.claims import Claim
from solutions import execute

START = """import torch
from dataclasses import replace
from lowrank_helpers import data, factorization, rank
from lowrank_helpers.series import run
load, recipes, measured = data.load, run.recipes(), rank.numerical_rank
decompositions = [of for of in vars(factorization).values() if isinstance(of, type) and hasattr(of, "of")]
"""
FAULTS = {  # what a first cell of the notebook does
    "none": "",
    "learning rates × 2": """
doubled = {kind: of | {"learning_rate": 2 * of["learning_rate"]} for kind, of in recipes.items()}
run.recipes = lambda: doubled""",
    "5 % of the training labels shuffled": """
def data_load(*given):
    labels = (found := load(*given)).train_labels
    some = torch.randperm(len(labels))[: len(labels) // 20]
    labels[some] = labels[some.roll(1)]
    return found
data.load = data_load""",
    "tested on training images": """
def data_load(*given):
    n = len((found := load(*given)).test_labels)
    return replace(found, test_images=found.train_images[-n:], test_labels=found.train_labels[-n:])
data.load = data_load""",
    "ranks two lower": """
rank.numerical_rank = lambda *given: measured(*given) - 2
for of in decompositions:
    of.factors = lambda self, rank, old=of.factors: old(self, max(1, rank - 2))""",
    "factors B transposed in memory": """
def transposed(factors):
    return factors._replace(B=factors.B.T.reshape(factors.B.shape))
for of in decompositions:
    of.factors = lambda self, rank, old=of.factors: transposed(old(self, rank))""",
}


def claims_of(name: str, given: dict[str, Any], fault: str) -> dict[str, Claim]:
    """Run a notebook, and those that it reads, with a first cell that breaks something; return what it claims."""
    planned = execution.plan(execution.with_what_they_read([name]), given)
    first = nbformat.v4.new_code_cell(START + fault)
    with tempfile.TemporaryDirectory() as made, execution.run_folder(Path(made)) as folder:
        ended = list(execute(planned, folder, lambda _, notebook: notebook.cells.insert(0, first)))
        for failure in results.failures(ended):
            click.echo(f"  failed: {failure}")
        return results.read_claims(folder)[name]["claims"]


@click.command(cls=cli.Command)
@click.argument("name", metavar="NOTEBOOK")
@cli.GIVEN
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="How many of each fault.")
def main(name: str, pairs: cli.Pairs, runs: int) -> None:
    """Say by what the check would notice that NOTEBOOK is broken in one of several ways."""
    given = cli.parameters_from(pairs)
    dataset = execution.settle_dataset({name: given})
    known = {each: found for each in execution.notebook_names() if (found := evidence.read(each, dataset))}
    if name not in known:
        cli.fail(f"{name} has no evidence on {dataset}: `python scripts/evidence.py {name}` records it")
    n_values = sum(each.n_values for each in known.values())
    for fault, source in FAULTS.items():
        claimed = [claims_of(name, given | {"seed": seed}, source) for seed in range(101, 101 + runs)]
        noticed = [evidence.unlike(known[name], claims, n_values) for claims in claimed]
        click.echo(f"{fault}: noticed in {sum(map(bool, noticed))} of {runs} runs")
        for line in chain(*(lines[:2] for lines in noticed)):
            click.echo(f"  {line}")
    runs_of = sorted((PROJECT / "reports" / "sweeps" / f"evidence-{dataset}" / "points").iterdir())
    others = {folder: gather([other for other in runs_of if other != folder], name) for folder in runs_of}
    alarms = [
        evidence.unlike(rest, results.read_claims(folder)[name]["claims"], n_values)
        for folder, rest in others.items()
        if rest
    ]
    click.echo(f"recorded runs unlike the others: {sum(map(bool, alarms))} of {len(alarms)}")
    for line in chain(*alarms):
        click.echo(f"  {line}")


if __name__ == "__main__":
    main()
