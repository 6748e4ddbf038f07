"""The command line: ``lowrank run``, ``sweep``, ``check``, ``analyze`` and ``compress``."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NoReturn

import click
from tqdm import tqdm

from lowrank_helpers import PROJECT, data
from lowrank_helpers.data import DatasetError
from lowrank_helpers.report import index
from lowrank_helpers.series import execution, parameters, results
from lowrank_helpers.series.execution import Planned, RunError
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.results import Outcome

Names = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]
OUTPUT = partial(click.option, "-o", "--output", type=click.Path(file_okay=False, path_type=Path))

NOTEBOOKS = click.argument("notebooks", nargs=-1)
SET = "Set a parameter in every notebook that has it. Lists as YAML: -p widths '[784, 256, 256, 10]'."
AXES = "seed=0..9, activation=relu,tanh, ranks='[[64, 64, 64, 64], [32, 32, 32, 32]]'"
GIVEN = click.option("-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help=SET)
FROM = "Read parameters from a YAML file, one 'name: value' a line; -p goes over it."
FILE = click.option("-f", "--file", type=click.File("rb"), help=FROM)
WORKERS = click.option("--workers", type=click.IntRange(min=1), help="How many work at once; one a core if not given.")
RESUME = click.option("--resume", is_flag=True, help="Keep what the folder has from the same notebooks and parameters.")
SCHEDULER = click.option("--scheduler", metavar="ADDRESS", help="Run on workers of a Dask cluster: tcp://… or tls://…")


class Command(click.Command):
    """A command that ends in one sentence where it cannot go on."""

    def invoke(self, context: click.Context) -> None:
        """Run the command."""
        try:
            super().invoke(context)
        except (ParameterError, DatasetError) as error:
            fail(str(error))
        except RunError as error:
            fail(str(error), code=1)
        except KeyboardInterrupt:
            to_go_on = " With --resume, the same command goes on." if "resume" in context.params else ""
            click.echo(f"\nStopped.{to_go_on}", err=True)
            sys.exit(128 + signal.SIGINT)  # as shells say it


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lowrank-helpers")
def main() -> None:
    """Run the series on the rank of trained networks, with parameters of your choice, and render what it finds.

    \b
    Start here:
      lowrank run              the whole series, into reports/latest/
      lowrank run --help       its notebooks, its parameters, examples
      lowrank analyze FILE     the ranks of your own network
    """  # noqa: D301 (\b is click's sign not to wrap)


main.command_class = Command


def parameters_from(pairs: Pairs, file: IO[bytes] | None = None) -> dict[str, Any]:
    """Read parameters from a file and from the command line, which goes over the file."""
    given: dict[str, Any] = parameters.parse(file.read(), file.name) if file else {}
    if file and not isinstance(given, dict):
        raise ParameterError(f"{file.name} must hold one 'name: value' a line")
    return given | {name: parameters.parse(value, f"parameter {name}") for name, value in pairs}


def _choices() -> str:
    """List what ``run`` can be given, for its help."""
    notebooks = "".join(f"\n  {name}" for name in execution.notebook_names())
    alike: dict[str, list[str]] = {}
    for name, rule in parameters.RULES.items():
        alike.setdefault(rule.allowed, []).append(name)
    rules = "".join(f"\n  {', '.join(names)}: {allowed}" for allowed, names in alike.items())
    return f"\b\nNotebooks:{notebooks}\n\n\b\nParameters, each for the notebooks that declare it:{rules}"


@main.command(epilog=_choices())
@NOTEBOOKS
@GIVEN
@FILE
@OUTPUT(default=PROJECT / "reports" / "latest", help="The run's folder; reports/latest if not given.")
@WORKERS
@RESUME
def run(
    notebooks: Names, pairs: Pairs, file: IO[bytes] | None, output: Path, workers: int | None, resume: bool
) -> None:
    """Execute NOTEBOOKS (all, if none is named) side by side, then render pages, index.html and results.json.

    \b
    Examples:
      lowrank run
      lowrank run --resume
      lowrank run 02_train 03_rank -p seed 3 -p activation tanh
      lowrank run -p dataset fashion_mnist -o reports/fashion
      lowrank run -f mine.yaml -p seed 1
    """  # noqa: D301
    start = time.perf_counter()
    planned = execution.plan(notebooks, parameters_from(pairs, file))
    dataset = execution.settle_dataset(planned)
    _warn_of_digits([dataset])
    outcomes: list[Outcome] = []
    with execution.run_folder(output, auto_dataset=dataset) as folder:
        try:
            for outcome in execution.execute(planned, folder, workers=workers, resume=resume):
                tqdm.write(f"{outcome.notebook:16} {outcome.status:7} {outcome.seconds:7.1f} s")
                outcomes.append(outcome)
        finally:
            if outcomes:
                seconds = time.perf_counter() - start
                index.render(folder, results.gather(folder, outcomes, seconds))
    click.echo(f"{'together':16} {'':7} {seconds:7.1f} s")
    failures = results.failures(outcomes)
    for failure in failures:
        click.echo(f"Failed: {failure}")
    click.echo(f"Open {os.path.relpath(output / 'index.html')}")
    sys.exit(1 if failures else 0)


@main.command(epilog=_choices())
@NOTEBOOKS
@click.option("-g", "--grid", "axes", multiple=True, metavar="NAME=VALUES", help=f"Sweep a parameter: {AXES}.")
@GIVEN
@FILE
@OUTPUT(default=PROJECT / "reports" / "sweeps" / "latest", help="A folder; reports/sweeps/latest if not given.")
@RESUME
@WORKERS
@SCHEDULER
def sweep(notebooks: Names, axes: Names, pairs: Pairs, file: IO[bytes] | None, output: Path, **how: Any) -> None:
    """Run NOTEBOOKS (all, if none is named) at every point of a grid of parameters, several points at a time.

    \b
    Examples:
      lowrank sweep 03_rank -g seed=0..9
      lowrank sweep 03_rank -g seed=0..9 --resume
      lowrank sweep 02_train -g seed=0..4 -g activation=relu,tanh -p dataset digits
      lowrank sweep 06_factorized -g seed=0..4 --scheduler tcp://node7:8786
    """  # noqa: D301
    from lowrank_helpers.series import sweep as sweeps

    definition = sweeps.Sweep(notebooks, dict(map(sweeps.grid_axis, axes)), parameters_from(pairs, file))
    points = sweeps.points(definition)

    def gather(folder: Path, failed: dict[str, str]) -> str:
        from lowrank_helpers.report import sweep_pages  # here, as what draws takes seconds to import

        sweep_pages.write(folder, definition, [*points], failed)
        return f"Open {os.path.relpath(output / 'index.html')}"

    run_points(points, output, gather, **how)


def run_points(
    points: dict[str, Planned],
    output: Path,
    gather: Callable[[Path, dict[str, str]], str],
    *,
    workers: int | None,
    scheduler: str | None,
    resume: bool,
) -> None:
    """Run points on a cluster and gather what they found, which returns a last word; exit with 1 if a point failed."""
    from lowrank_helpers.series import cluster, sweep  # here: other commands need not wait for the import of Dask

    if workers and scheduler:
        fail("--workers starts workers here; with --scheduler the cluster has its own")
    failed: dict[str, str] = {}
    with execution.locked(output) as folder:
        resolve = cache(data.resolve)  # points of one dataset ask for it once
        datasets = {point: execution.settle_dataset(planned, resolve) for point, planned in points.items()}
        _warn_of_digits(datasets.values())
        with cluster.connected(scheduler, workers) as client:
            ended = sweep.run(client, points, folder, datasets, resume=resume)
            for point, error in tqdm(ended, total=len(points), unit="point", disable=None):
                failed |= {point: error} if error else {}
                tqdm.write(f"{point}: {'failed' if error else 'done'}", file=sys.stderr)
        last_word = gather(folder, failed)
    for reason in dict.fromkeys(failed.values()):
        first, *others = (name for name in failed if failed[name] == reason)
        more = f" and {len(others)} more" if others else ""
        click.echo(f"Failed twice: {first}{more}: {reason}")
    click.echo(f"Points: {len(points)}, failed: {len(failed)}. {last_word}")
    sys.exit(1 if failed else 0)


@main.command()
@NOTEBOOKS
@GIVEN
@WORKERS
def check(notebooks: Names, pairs: Pairs, workers: int | None) -> None:
    """Re-execute recorded NOTEBOOKS (all, if none is named) and compare their outputs with the recorded ones.

    \b
    Examples:
      lowrank check
      lowrank check 02_train -p precision float32
    """  # noqa: D301
    from lowrank_helpers.series import checking

    planned = execution.plan(execution.with_what_they_read(notebooks), parameters_from(pairs))
    data.resolve("mnist")  # on which the notebooks are recorded: here, that it is said once if it cannot be had
    n_faults = 0
    for outcome, faults, remarks in checking.check(planned, workers=workers):
        tqdm.write(f"{outcome.notebook:16} {'differs' if faults else 'agrees':7} {outcome.seconds:7.1f} s")
        for line in [*faults, *(f"({remark})" for remark in remarks)]:
            tqdm.write(f"  {line}")
        n_faults += len(faults)
    click.echo(f"Notebooks: {len(planned)}, differences: {n_faults}")
    sys.exit(1 if n_faults else 0)


@main.command()
@click.argument("source", metavar="FILE_OR_CALLABLE")
@OUTPUT(help="Write the table with a figure to index.html in this folder, and all numbers to results.json.")
def analyze(source: str, output: Path | None) -> None:
    """Measure the rank of every matrix of your own network: a file of weights, or a model.

    A file is .safetensors, PyTorch's .pt, .pth, .bin, .ckpt or .pth.tar, or the index.json of several; its code never
    runs. package.module:name is imported, and so runs code: yours. It is a torch.nn.Module, or what returns one.

    \b
    Examples:
      lowrank analyze model.safetensors
      lowrank analyze checkpoint.pt -o reports/mine
      lowrank analyze torchvision.models:resnet18
    """  # noqa: D301
    from lowrank_helpers import analysis
    from lowrank_helpers.report import analysis_page

    try:
        if output:
            output.mkdir(parents=True, exist_ok=True)  # before time is spent
        found = analysis.analyze(source)
        click.echo(analysis_page.text(found))
        if output:
            analysis_page.write(output, found)
            click.echo(f"\nOpen {os.path.relpath(output / 'index.html')}")
    except analysis.AnalysisError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{output} cannot be written to: {error.strerror}")


@main.command()
@click.argument("model")
@click.option("--data", required=True, help="A DataLoader, a list of batches, a tensor of inputs, or what returns it.")
@click.option("--forward", help="A function forward(model, batch) that returns one tensor; model(batch) if not given.")
@click.option("--metric", default="parameters", help="parameters, flops, latency, or a function that scores a model.")
@click.option("--budget", type=float, default=0.5, help="Share of the metric, or the least score; 0.5 if not given.")
@OUTPUT(required=True, help="Write model.safetensors, ranks.json and a page, index.html, into this folder.")
def compress(model: str, data: str, forward: str | None, metric: str, budget: float, output: Path) -> None:
    """Write a smaller copy of your own network, of low-rank layers, with a report of what it costs and gains.

    MODEL, a torch.nn.Module or a function that returns one, and all else are package.module:name. They are imported,
    and so execute code: yours. lowrank_helpers.layers.load(model, folder) gives the copy back.

    \b
    Examples:
      lowrank compress mine.networks:trained --data mine.data:loader --budget 0.3 -o small
      lowrank compress mine.networks:trained --data mine.data:loader --metric mine:accuracy --budget 0.97 -o small
    """  # noqa: D301
    from lowrank_helpers import calibration, compression, layers
    from lowrank_helpers.analysis import imported
    from lowrank_helpers.report import compression_page

    try:
        run = imported(forward, called=False) if forward else calibration.call
        of = imported(metric, called=False) if ":" in metric else metric
        network, batches = imported(model), imported(data)
        output.mkdir(parents=True, exist_ok=True)
        n_budgets = compression_page.N_BUDGETS
        small, report = compression.compress(network, batches, budget, forward=run, metric=of, n_budgets=n_budgets)
        layers.save(small, output)
        compression_page.write(output, model, report)
    except Exception as error:  # the code is the user's own: it may raise anything
        fail(f"{model} was not compressed; {type(error).__name__}: {error}")
    click.echo(report)


def _warn_of_digits(datasets: Iterable[str]) -> None:
    if "digits" in datasets:
        click.secho("Dataset: digits (8×8, resampled), not MNIST. README.md says how to provide MNIST.", fg="yellow")


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with one sentence, and by default with the exit code of bad input."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
