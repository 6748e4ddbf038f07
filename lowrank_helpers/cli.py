"""The command line: ``lowrank run``, ``sweep``, ``evidence``, ``check`` and ``analyze``."""

import functools
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from tqdm import tqdm

from lowrank_helpers import PROJECT
from lowrank_helpers.data import DatasetError
from lowrank_helpers.report import index
from lowrank_helpers.series import evidence as recorded
from lowrank_helpers.series import execution, parameters, results
from lowrank_helpers.series.execution import RunFolderError
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.results import Outcome
from lowrank_helpers.series.settings import Settings

if TYPE_CHECKING:
    from distributed import Client

    from lowrank_helpers.series.sweep import Ended, Point

    Connection = AbstractContextManager[Client]

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT  # as shells say it
Names = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]
A_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
A_FOLDER = click.Path(file_okay=False, path_type=Path)

SET = "Set a parameter in every notebook that has it. Lists as YAML: -p widths '[784, 256, 256, 10]'."
GIVEN = click.option("-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help=SET)
WORKERS = click.option(
    "--workers", type=click.IntRange(min=1), help="Processes to start here; one a core if not given."
)
RESUME = click.option("--resume", is_flag=True, help="Keep what the folder has from the same notebooks and parameters.")


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


def _parameters_from(pairs: Pairs, file: Path | None) -> dict[str, Any]:
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
    alike: dict[str, list[str]] = {}
    for name, rule in parameters.RULES.items():
        alike.setdefault(rule.allowed, []).append(name)
    rules = "".join(f"\n  {', '.join(names)}: {allowed}" for allowed, names in alike.items())
    return f"\b\nNotebooks:{notebooks}\n\n\b\nParameters, each for the notebooks that declare it:{rules}"


def _on_a_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a cluster, and the connection in their place."""

    @WORKERS
    @click.option("--scheduler", metavar="ADDRESS", help="Run on the workers of a Dask cluster: tcp://… or tls://…")
    @click.option("--tls-ca-file", type=A_FILE, help="The cluster's certificate authority, for tls://.")
    @click.option("--tls-cert", type=A_FILE, help="This client's certificate, for tls://.")
    @click.option("--tls-key", type=A_FILE, help="This client's key, for tls://.")
    @functools.wraps(command)
    def connecting(workers: int | None, scheduler: str | None, **given: Any) -> None:
        from lowrank_helpers.series import cluster  # here: other commands need not wait for the import of Dask

        tls = list(filter(None, [given.pop(name) for name in ("tls_ca_file", "tls_cert", "tls_key")]))
        if tls and not (scheduler and len(tls) == 3):
            _fail("--tls-ca-file, --tls-cert and --tls-key go together, and with --scheduler")
        if workers and scheduler:
            _fail("--workers starts workers here; with --scheduler the cluster has its own")
        command(**given, connection=cluster.connected(scheduler, workers=workers, tls=tls))

    return connecting


@main.command(epilog=_choices())
@click.argument("notebooks", nargs=-1)
@GIVEN
@click.option("-f", "--file", type=A_FILE, help="Read parameters from a YAML file, one 'name: value' a line.")
@click.option(
    "-o",
    "--output",
    type=A_FOLDER,
    default=PROJECT / "reports" / "latest",
    help="The run's folder, reports/latest if not given: notebooks, pages, results.json, trained networks.",
)
@WORKERS
@RESUME
def run(notebooks: Names, pairs: Pairs, file: Path | None, output: Path, workers: int | None, resume: bool) -> None:
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
@GIVEN
@click.option(
    "-f",
    "--file",
    type=A_FILE,
    help="Read notebooks, grid, parameters and what to show from a YAML file such as those in sweeps/; "
    "NOTEBOOKS, -g and -p go over it.",
)
@click.option(
    "-o",
    "--output",
    type=A_FOLDER,
    help="The sweep's folder, reports/sweeps/ and the file's name if not given: table, page, a run folder a point.",
)
@RESUME
@_on_a_cluster
def sweep(
    notebooks: Names,
    axes: Names,
    pairs: Pairs,
    file: Path | None,
    output: Path | None,
    resume: bool,
    connection: "Connection",
) -> None:
    """Run NOTEBOOKS (all, if none is named) at every point of a grid of parameters, several points at a time.

    \b
    Examples:
      lowrank sweep 03_rank -g seed=0..9
      lowrank sweep 02_train -g seed=0..4 -g activation=relu,tanh -p epochs 5
      lowrank sweep -f sweeps/widths.yaml --resume
      lowrank sweep -f sweeps/ranks.yaml --scheduler tcp://node7:8786
    """  # noqa: D301
    from lowrank_helpers.series import sweep as sweeps

    try:
        definition = sweeps.read(file) if file else sweeps.Sweep()
        definition = definition.over(notebooks, dict(map(sweeps.grid_axis, axes)), _parameters_from(pairs, None))
        points = sweeps.points(definition)
    except ParameterError as error:
        _fail(str(error))
    output = output or PROJECT / "reports" / "sweeps" / (file.stem if file else "sweep")

    def gather(folder: Path, failed: dict[str, str]) -> str:
        from lowrank_helpers.report import sweep_pages  # here, as what draws takes seconds to import

        sweep_pages.write(folder, definition, points, failed)
        return f"Open {os.path.relpath(output / 'index.html')}"

    _sweep(points, output, resume, connection, gather)


@main.command()
@click.argument("notebooks", nargs=-1)
@GIVEN
@click.option(
    "--seeds",
    default=f"{recorded.SEEDS[0]}..{recorded.SEEDS[-1]}",
    show_default=True,
    help="One run each: 1..20, or 3,5. Odd seeds run in float32, even ones in what is fastest; -p precision overrides.",
)
@_on_a_cluster
def evidence(notebooks: Names, pairs: Pairs, seeds: str, connection: "Connection") -> None:
    """Run NOTEBOOKS (all, if none is named) from many seeds, and write what they measure into evidence/.

    Notebooks that these read are run too. The runs lie in reports/sweeps/evidence-DATASET/, a folder a seed. Runs that
    lie there from the same code are kept, so a stopped command goes on where it was, and the runs of further seeds are
    added to the evidence.

    \b
    Examples:
      lowrank evidence
      lowrank evidence 03_rank --seeds 21..30
      lowrank evidence -p dataset digits --seeds 1..10
    """  # noqa: D301
    from lowrank_helpers.series import sweep as sweeps

    try:
        points = recorded.points(notebooks, sweeps.grid_values(seeds), _parameters_from(pairs, None))
        dataset = execution.settle_dataset(points[0].planned)
    except (ParameterError, DatasetError) as error:
        _fail(str(error))

    def gather(folder: Path, failed: dict[str, str]) -> str:
        for name in points[0].planned:
            if found := recorded.gather(sorted((folder / "points").iterdir()), name):
                click.echo(f"{os.path.relpath(recorded.write(found))}: {len(found.runs)} runs")
        return "`make record` shows the claims of notebooks beside it."

    _sweep(points, PROJECT / "reports" / "sweeps" / f"evidence-{dataset}", True, connection, gather)


@main.command()
@click.argument("notebooks", nargs=-1)
@GIVEN
def check(notebooks: Names, pairs: Pairs) -> None:
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
@click.argument("source", metavar="FILE_OR_CALLABLE")
@click.option(
    "-o",
    "--output",
    type=A_FOLDER,
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
        click.echo(f"\nStopped; {len(outcomes)} of {len(planned)} notebooks are done. {_to_go_on(resume)}", err=True)
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
    points: list["Point"],
    output: Path,
    resume: bool,
    connection: "Connection",
    gather: Callable[[Path, dict[str, str]], str],
) -> None:
    """Run points on a cluster and gather what they found, which returns a last word; exit with 1 if a point failed."""
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
            last_word = gather(folder, failed)
    except DatasetError as error:
        _fail(str(error))
    except (RunFolderError, ClusterError) as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        click.echo(f"\nStopped; {len(ended)} of {len(points)} points are done. {_to_go_on(resume)}", err=True)
        sys.exit(INTERRUPTED)
    by_reason: dict[str, list[str]] = {}
    for name, reason in failed.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        click.echo(f"Failed twice: {_first_few(names)}: {reason}")
    click.echo(f"Points: {len(points)}, failed: {len(failed)}. {last_word}")
    if failed:
        sys.exit(1)


def _to_go_on(resume: bool) -> str:
    return "The same command goes on." if resume else "Add --resume to go on."


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
