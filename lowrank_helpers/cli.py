"""The command line: ``lowrank run``, ``lowrank sweep``, ``lowrank record``, ``lowrank check``, ``lowrank analyze``."""

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from tqdm import tqdm

from lowrank_helpers import data
from lowrank_helpers.data import PROJECT, DatasetError
from lowrank_helpers.report import index
from lowrank_helpers.series import execution, parameters, results
from lowrank_helpers.series.execution import RunFolderError
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.results import Outcome
from lowrank_helpers.series.settings import Settings

if TYPE_CHECKING:
    from distributed import Client

    from lowrank_helpers.series.sweep import Ended, Point, Sweep

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT  # as shells say it
CERTIFICATE = click.Path(exists=True, dir_okay=False, path_type=Path)


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
    notebooks = "".join(f"\n  {name}" for name in execution.notebook_names())
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
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Notebooks to execute at once; one a core if not given. Numbers do not depend on it.",
)
@click.option("--resume", is_flag=True, help="Keep what the folder has from the same notebooks and parameters.")
def run(
    notebooks: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    file: Path | None,
    output: Path,
    workers: int | None,
    resume: bool,
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
    try:
        planned = execution.plan(notebooks, _parameters_from(pairs, file))
    except ParameterError as error:
        _fail(str(error))
    _run(planned, output, workers, resume)


@main.command(epilog=_choices())
@click.argument("notebooks", nargs=-1)
@click.option(
    "-g",
    "--grid",
    "axes",
    multiple=True,
    metavar="NAME=VALUES",
    help="Sweep a parameter: seed=0..9, activation=relu,tanh, ranks='[[64, 64, 64, 64], [32, 32, 32, 32]]'.",
)
@click.option(
    "-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Fix a parameter at all points."
)
@click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read notebooks, grid, parameters and what to show from a YAML file such as those in sweeps/; "
    "NOTEBOOKS, -g and -p go over it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The sweep's folder, reports/sweeps/ and the file's name if not given: table, page, a run folder a point.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes to start here; one a core if not given.")
@click.option("--scheduler", metavar="ADDRESS", help="Run on the workers of a Dask cluster: tcp://… or tls://…")
@click.option("--tls-ca-file", type=CERTIFICATE, help="The cluster's certificate authority, for tls://.")
@click.option("--tls-cert", type=CERTIFICATE, help="This client's certificate, for tls://.")
@click.option("--tls-key", type=CERTIFICATE, help="This client's key, for tls://.")
@click.option("--resume", is_flag=True, help="Keep what the folder has from the same notebooks and parameters.")
@click.option("--record", "recorded", is_flag=True, help="Copy table and page to reports/reference/sweeps/.")
def sweep(
    notebooks: tuple[str, ...],
    axes: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    file: Path | None,
    output: Path | None,
    workers: int | None,
    scheduler: str | None,
    tls_ca_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    resume: bool,
    recorded: bool,
) -> None:
    """Run NOTEBOOKS (all, if none is named) at every point of a grid of parameters, several points at a time.

    \b
    Examples:
      lowrank sweep 03_rank -g seed=0..9
      lowrank sweep 02_train -g seed=0..4 -g activation=relu,tanh -p epochs 5
      lowrank sweep -f sweeps/widths.yaml --resume
      lowrank sweep -f sweeps/ranks.yaml --scheduler tcp://node7:8786
    """  # noqa: D301
    from lowrank_helpers.series import cluster  # here: other commands need not wait for the import of Dask
    from lowrank_helpers.series import sweep as sweeps

    tls = [part for part in (tls_ca_file, tls_cert, tls_key) if part]
    if tls and not (scheduler and len(tls) == 3):
        _fail("--tls-ca-file, --tls-cert and --tls-key go together, and with --scheduler")
    if workers and scheduler:
        _fail("--workers starts workers here; with --scheduler the cluster has its own")
    try:
        definition = sweeps.read(file) if file else sweeps.Sweep()
        definition = definition.over(notebooks, dict(map(sweeps.grid_axis, axes)), _parameters_from(pairs, None))
        points = sweeps.points(definition)
    except ParameterError as error:
        _fail(str(error))
    name = file.stem if file else "sweep"
    output = output or PROJECT / "reports" / "sweeps" / name
    _sweep(definition, points, output, resume, cluster.connected(scheduler, workers=workers, tls=tls))
    if recorded:
        from lowrank_helpers.report import sweep_pages

        sweep_pages.publish(output, PROJECT / "reports" / "reference" / "sweeps" / name)
        click.echo(f"Recorded in reports/reference/sweeps/{name}/.")


@main.command()
def record() -> None:
    """Run the series with its defaults, and write the outputs into notebooks/ and reports/reference/."""
    try:
        planned = execution.plan((), {})
        data.resolve("mnist")  # not digits in its place, which a run would take
    except (ParameterError, DatasetError) as error:
        _fail(str(error), code=1)
    latest = PROJECT / "reports" / "latest"
    _run(planned, latest)
    execution.record(latest)
    index.publish(latest, PROJECT / "reports" / "reference")
    click.echo("Recorded in notebooks/ and reports/reference/.")


@main.command()
@click.argument("notebooks", nargs=-1)
@click.option(
    "-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Another value than the recorded."
)
def check(notebooks: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> None:
    """Re-execute recorded NOTEBOOKS (all, if none is named) and compare their outputs with the recorded ones.

    \b
    Examples:
      lowrank check
      lowrank check 02_train -p precision float32
    """  # noqa: D301
    try:  # here, not above: pytest and nbval come with the extra `test` alone
        from lowrank_helpers.checking import plugin
    except ModuleNotFoundError as error:
        _fail(f"`lowrank check` needs {error.name}: pip install 'lowrank-helpers[test]'", code=1)
    try:
        sys.exit(plugin.check(notebooks, _parameters_from(pairs, None)))
    except (ParameterError, DatasetError) as error:
        _fail(str(error))


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def tolerances(folders: tuple[Path, ...]) -> None:
    """Set where recorded numbers may lie, from the points of sweeps over seeds and precisions in FOLDERS.

    \b
    Example:
      lowrank sweep -f sweeps/chains.yaml
      lowrank tolerances reports/sweeps/chains
    """  # noqa: D301
    from lowrank_helpers.checking import tolerances as limits

    try:
        worded = limits.set_limits(folders)
    except limits.ChainsError as error:
        _fail(str(error), code=1)
    click.echo("Set in notebooks/; docs/tolerances.md says what they are worth.")
    if worded:
        _fail("words differ between chains, so these cells cannot be checked:\n" + "\n".join(worded), code=1)


@main.command()
@click.argument("source", metavar="FILE_OR_CALLABLE")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the table, with all names and a figure, to index.html in this folder, and all numbers to results.json.",
)
def analyze(source: str, output: Path | None) -> None:
    """Measure the rank of every matrix of your own network: a file of weights, or a model.

    A file is .safetensors, or PyTorch's .pt, .pth or .bin with a state_dict; none of its code is ever executed.
    package.module:callable is imported and called, and so does execute code: yours. It returns a torch.nn.Module.

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
            analysis_page.check(output)
        found = analysis.analyze(source)
    except analysis.AnalysisError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        click.echo("\nStopped.", err=True)
        sys.exit(INTERRUPTED)
    click.echo(analysis_page.text(found))
    if output:
        try:
            analysis_page.write(output, found)
        except OSError as error:
            _fail(f"{output} cannot be written to: {error.strerror}", code=1)
        click.echo(f"\nOpen {os.path.relpath(output / 'index.html')}")


def _run(planned: dict[str, dict[str, Any]], output: Path, workers: int | None = None, resume: bool = False) -> None:
    """Execute, gather and render; exit with 1 if a notebook failed."""
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    try:
        dataset = execution.settle_dataset(planned)
        if dataset == "digits":
            _warn_of_digits()
        with execution.run_folder(output, replace(Settings.of_command(), auto_dataset=dataset)) as folder:
            try:
                for outcome in _executed(planned, folder, workers, resume):
                    outcomes.append(outcome)
            finally:
                if outcomes:
                    seconds = time.perf_counter() - start
                    index.render(folder, results.gather(folder, outcomes, seconds))
    except DatasetError as error:
        _fail(str(error))
    except RunFolderError as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        click.echo(f"\nStopped; {len(outcomes)} of {len(planned)} notebooks are done. Add --resume to go on.", err=True)
        sys.exit(INTERRUPTED)
    _summarise(sorted(outcomes, key=lambda outcome: outcome.notebook), seconds, output)


def _executed(planned: dict[str, dict[str, Any]], folder: Path, workers: int | None, resume: bool) -> Iterator[Outcome]:
    """Execute notebooks by so many workers, yielding how each ended; one worker is this process."""
    if workers == 1 or len(planned) == 1:
        yield from execution.execute(planned, folder, resume=resume)
        return
    from lowrank_helpers.series import cluster  # here: other commands need not wait for the import of Dask

    workers = min(workers or cluster.CPU_COUNT, len(planned))
    with (
        cluster.connected(workers=workers, threads=cluster.CPU_COUNT) as client,
        _line("{desc}", len(planned)) as line,
    ):
        n_ended = 0
        for ended, standing in execution.execute_side_by_side(planned, folder, client, resume=resume):
            n_ended += len(ended)
            stand = f"{n_ended} of {len(planned)} notebooks done; cells: {', '.join(standing) or '–'}"
            _tell(line, stand, n_ended, news=bool(ended))
            yield from ended


def _sweep(
    definition: "Sweep", points: list["Point"], output: Path, resume: bool, connection: AbstractContextManager["Client"]
) -> None:
    """Run points on a cluster, gather table and page; exit with 1 if a point failed."""
    from lowrank_helpers.series import sweep as sweeps
    from lowrank_helpers.series.cluster import ClusterError

    ended: list[Ended] = []
    try:
        with execution.held(output) as folder:
            datasets = sweeps.settle_datasets(points)
            if "digits" in datasets.values():
                _warn_of_digits()
            with connection as client:
                sweeps.forget(points, folder, resume=resume)
                for news in _followed(sweeps.run(client, points, folder, datasets), len(points)):
                    ended += news
            failed = {end.point.name: end.error for end in ended if end.error}
            from lowrank_helpers.report import sweep_pages  # here, as what draws takes seconds to import

            sweep_pages.write(folder, definition, points, failed)
    except DatasetError as error:
        _fail(str(error))
    except (RunFolderError, ClusterError) as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        click.echo(f"\nStopped; {len(ended)} of {len(points)} points are done. Add --resume to go on.", err=True)
        sys.exit(INTERRUPTED)
    by_reason: dict[str, list[str]] = {}
    for name, reason in failed.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        click.echo(f"Failed twice: {_first_few(names)}: {reason}")
    click.echo(f"Points: {len(points)}, failed: {len(failed)}. Open {os.path.relpath(output / 'index.html')}")
    if failed:
        sys.exit(1)


def _followed(progress: Iterator[tuple[list["Ended"], int]], n_points: int) -> Iterator[list["Ended"]]:
    """Pass on which points ended, and keep a line on how the sweep stands; where there is no terminal, one for each."""
    n_ended = n_failed = 0
    with _line("{desc}, {remaining} left", n_points) as line:
        for ended, n_running in progress:
            n_ended += len(ended)
            n_failed += sum(bool(end.error) for end in ended)
            stand = f"{n_ended - n_failed} of {n_points} points done, {n_running} running, {n_failed} failed"
            _tell(line, stand, n_ended, news=bool(ended))
            yield ended


def _line(format: str, total: int) -> tqdm:
    """Return a line on how it all stands, which is drawn anew in a terminal, and for others to be printed."""
    return tqdm(
        total=total,
        file=sys.stderr if sys.stderr.isatty() else io.StringIO(),
        disable=False,  # though the environment hides bars: this line alone says how it stands
        bar_format=format,
        smoothing=0,  # points are few: their mean tells more than the last ones
    )


def _tell(line: tqdm, stand: str, n_ended: int, *, news: bool) -> None:
    """Say how it stands: in a terminal on that line; elsewhere by a line of its own, where there is news."""
    line.n = n_ended
    line.set_description_str(stand)
    if news and not sys.stderr.isatty():
        click.echo(str(line), err=True)


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _summarise(outcomes: list[Outcome], seconds: float, output: Path) -> None:
    for outcome in outcomes:
        click.echo(f"{outcome.notebook:16} {outcome.status:7} {outcome.seconds:7.1f} s")
    click.echo(f"{'together':16} {'':7} {seconds:7.1f} s")
    failures = results.failures(outcomes)
    for failure in failures:
        click.echo(f"Failed: {failure}")
    click.echo(f"Open {os.path.relpath(output / 'index.html')}")
    if failures:
        sys.exit(1)


def _warn_of_digits() -> None:
    click.secho("Dataset: digits (8×8, resampled), not MNIST. README.md says how to provide MNIST.", fg="yellow")


def _fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
