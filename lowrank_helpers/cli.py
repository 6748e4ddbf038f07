"""The command line: ``lowrank run``, ``lowrank record``, ``lowrank check``."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from lowrank_helpers import parameters, report, results, runner
from lowrank_helpers.data import PROJECT, DatasetError
from lowrank_helpers.parameters import ParameterError
from lowrank_helpers.results import Outcome
from lowrank_helpers.runner import RunFolderError

BAD_INPUT = 2
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lowrank-helpers")
def main() -> None:
    """Run the series on the rank of trained networks, with parameters of your choice, and render what it finds.

    \b
    Start here:
      lowrank run              the whole series, into reports/latest/
      lowrank run --help       its notebooks, its parameters, examples
    """  # noqa: D301 (\b is click's sign not to wrap)


def _parameters_from(pairs: tuple[tuple[str, str], ...], file: Path | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if file:
        content = parameters.parse(file.read_bytes(), str(file))
        if not isinstance(content, dict):
            raise ParameterError(f"{file} must hold one 'name: value' a line")
        given |= content
    return given | {name: parameters.parse(value, f"parameter {name}") for name, value in pairs}


def _choices() -> str:
    """List what ``run`` can be given, for its help."""
    notebooks = "".join(f"\n  {name}" for name in runner.notebook_names())
    rules = "".join(f"\n  {name:18} {rule.allowed}" for name, rule in parameters.RULES.items())
    return f"\b\nNotebooks:{notebooks}\n\n\b\nParameters, each for the notebooks that declare it:{rules}"


@main.command(epilog=_choices())
@click.argument("notebooks", nargs=-1)
@click.option(
    "-p",
    "--parameter",
    "pairs",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Set a parameter in every notebook that has it. Lists as YAML: -p widths '[784, 256, 256, 10]'.",
)
@click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read parameters from a YAML file, one 'name: value' a line; -p goes over it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=PROJECT / "reports" / "latest",
    help="The run's folder, reports/latest if not given: notebooks, pages, results.json, trained networks.",
)
@click.option("--resume", is_flag=True, help="Keep what the folder has from the same notebooks and parameters.")
def run(
    notebooks: tuple[str, ...], pairs: tuple[tuple[str, str], ...], file: Path | None, output: Path, resume: bool
) -> None:
    """Execute NOTEBOOKS (all, if none is named) in order, then render pages, index.html and results.json.

    \b
    Examples:
      lowrank run
      lowrank run --resume
      lowrank run 02_train 03_rank -p seed 3 -p activation tanh
      lowrank run -p dataset fashion_mnist -o reports/fashion
      lowrank run -f mine.yaml -p seed 1
    """  # noqa: D301
    try:
        planned = runner.plan(notebooks, _parameters_from(pairs, file))
    except ParameterError as error:
        _fail(str(error))
    _run(planned, output, resume)


@main.command()
def record() -> None:
    """Run the series with its defaults, and write the outputs into notebooks/ and reports/reference/."""
    latest = PROJECT / "reports" / "latest"
    _run(runner.plan((), {}), latest, resume=False)
    runner.record(latest)
    report.publish(latest, PROJECT / "reports" / "reference")
    click.echo("Recorded in notebooks/ and reports/reference/.")


@main.command()
@click.argument("notebooks", nargs=-1)
def check(notebooks: tuple[str, ...]) -> None:
    """Re-execute recorded NOTEBOOKS (all, if none is named) and compare their outputs with the recorded ones."""
    try:
        from lowrank_helpers import checking  # here, not above: pytest and nbval come with the extra `test` alone
    except ModuleNotFoundError as error:
        _fail(f"`lowrank check` needs {error.name}: pip install 'lowrank-helpers[test]'", code=1)
    try:
        sys.exit(checking.check(notebooks))
    except (ParameterError, DatasetError) as error:
        _fail(str(error))


def _run(planned: dict[str, dict[str, Any]], output: Path, resume: bool) -> None:
    """Execute, gather and render; exit with 1 if a notebook failed."""
    outcomes: list[Outcome] = []
    try:
        with runner.run_folder(output) as folder:
            if runner.settle_dataset(planned) == "digits":
                click.secho(
                    "Dataset: digits (8×8, resampled), not MNIST. README.md says how to provide MNIST.", fg="yellow"
                )
            try:
                for outcome in runner.execute(planned, folder, resume=resume):
                    outcomes.append(outcome)
            finally:
                if outcomes:
                    report.render(folder, results.gather(folder, outcomes))
    except DatasetError as error:
        _fail(str(error))
    except RunFolderError as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        click.echo(f"\nStopped; {len(outcomes)} of {len(planned)} notebooks are done. Add --resume to go on.", err=True)
        sys.exit(INTERRUPTED)
    _summarise(outcomes, output)


def _summarise(outcomes: list[Outcome], output: Path) -> None:
    for outcome in outcomes:
        click.echo(f"{outcome.notebook:16} {outcome.status:7} {outcome.seconds:7.1f} s  {outcome.error}")
    click.echo(f"{'together':16} {'':7} {sum(outcome.seconds for outcome in outcomes):7.1f} s")
    click.echo(f"Open {os.path.relpath(output / 'index.html')}")
    if any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


def _fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
