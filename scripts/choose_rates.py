"""Choose the learning rates of the series' comparisons on validation images.

Every arm of a comparison (a network and how it is trained) is trained at every rate of one grid on 50,000 of MNIST's
training images and scored on the 10,000 set aside, from seeds that no notebook uses. The rate of an arm is the one with
the highest mean accuracy: the default of the notebook that compares it. A test sees to that.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from threading import Event

import click
import pandas as pd
from filelock import FileLock
from torch import nn
from tqdm import tqdm

from lowrank_helpers import data, dlrt, factorization, lora
from lowrank_helpers.compression import compress, pruned
from lowrank_helpers.data import PROJECT, Dataset
from lowrank_helpers.models import VisionTransformer, convnet, linear_layers, mlp
from lowrank_helpers.selection import by_shares, layers_of, narrow_widths
from lowrank_helpers.series.execution import notebook_path
from lowrank_helpers.series.parameters import declared
from lowrank_helpers.series.store import Store, write_atomically
from lowrank_helpers.subspace import SubspaceModel
from lowrank_helpers.training import (
    History,
    Recipe,
    pick_device,
    pick_precision,
    predict,
    side_by_side,
    take_one_thread_each,
)

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SUBSPACE_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)  # a coordinate of a subspace moves each weight by a small share of its step
FINE_TUNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
FEW_EPOCHS_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # where a network takes few steps
SHORT_TUNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (100, 101)
STRENGTHS = (1e-4, 1e-3, 1e-2)  # of decay
TABLE = PROJECT / "sweeps" / "rates.csv"
KEY = ["arm", "learning_rate", "epochs", "seed"]


class Bench:
    """What arms are trained with: the data, and a store that trains nothing twice."""

    def __init__(self, data_dir: str, networks: Path) -> None:
        self.device = pick_device()
        self.precision = pick_precision("auto", self.device)
        self.data = data.load("mnist", data_dir).hold_out().to(self.device)
        self._store = Store(networks)

    def train(self, model: nn.Module, data: Dataset, recipe: Recipe, stop: Event | None = None) -> History:
        """Train a network in place, or load it."""
        return self._store.trained(model.to(self.device), data, recipe, stop=stop)

    def taught(self, teacher: "Arm", rate: float, seed: int) -> nn.Module:
        """Return the network that an arm gives at a rate, for another arm to go on from."""
        network = teacher.start(self, seed)
        recipe = Recipe(teacher.epochs, teacher.batch_size, rate, seed=seed, precision=self.precision)
        self.train(network, teacher.select(self, seed), recipe)
        return network


@dataclass(frozen=True)
class Arm:
    """A network and its training, but for the rate.

    Attributes
    ----------
    start : callable
        Of the bench and a seed: returns the network before the training.
    epochs, batch_size : int
    penalty : dict
        ``weight_decay`` or ``frobenius_decay`` of the recipe.
    select : callable
        Of the bench and a seed: returns the data to train and score on.
    rates : tuple of float
        The grid.
    """

    start: Callable[[Bench, int], nn.Module]
    epochs: int
    batch_size: int
    penalty: dict[str, float] = field(default_factory=dict)
    select: Callable[[Bench, int], Dataset] = lambda bench, seed: bench.data
    rates: tuple[float, ...] = RATES


def dense(bench: Bench, seed: int, *, widths: Sequence[int], activation: str) -> nn.Module:
    """Return a fresh dense network."""
    return mlp(widths, activation, seed=seed)


def standard(bench: Bench, seed: int, *, widths: Sequence[int], activation: str, ranks: Sequence[int]) -> nn.Module:
    """Return a network of freshly drawn factors."""
    network = mlp(widths, activation, seed=seed)
    return factorization.factorize_standard(network, by_layer(network, ranks), seed=seed)


def spectral(bench: Bench, seed: int, *, widths: Sequence[int], activation: str, ranks: Sequence[int]) -> nn.Module:
    """Return a network of the best factors of a fresh dense one."""
    network = mlp(widths, activation, seed=seed)
    return factorization.factorize(network, by_layer(network, ranks))


def subspace(bench: Bench, seed: int, *, widths: Sequence[int], activation: str, dimension: int) -> nn.Module:
    """Return a fresh dense network of which a random subspace is trained."""
    return SubspaceModel(mlp(widths, activation, seed=seed), dimension, seed=seed)


def cut(bench: Bench, seed: int, *, ranks: Sequence[int], teacher: Arm, rate: float) -> nn.Module:
    """Return the best factors of a dense network that this seed has trained."""
    network = bench.taught(teacher, rate, seed)
    return factorization.factorize(network, by_layer(network, ranks))


def nine_digits(bench: Bench, seed: int, *, digit: int) -> Dataset:
    """Return the data without a digit."""
    whole = bench.data
    return whole.select(**{split: labels != digit for split, (_, labels) in whole.splits().items()})


def rehearsed(bench: Bench, seed: int, *, digit: int, n_kept: int, share: float) -> Dataset:
    """Return a training set of a digit with kept images of the others; the validation images are of all ten."""
    whole = bench.data
    size = int((whole.train_labels == digit).sum())
    return whole.select(
        train=lora.rehearsal(whole.train_labels, digit, size=size, n_kept=n_kept, share=share, seed=seed)
    )


def fine_tuned(
    bench: Bench, seed: int, *, teacher: Arm, rate: float, change: Callable[[nn.Module, int], nn.Module]
) -> nn.Module:
    """Return a network that this seed has trained, changed for its fine-tuning."""
    return change(bench.taught(teacher, rate, seed), seed)


def adapted(network: nn.Module, seed: int, *, rank: int, alpha: float) -> nn.Module:
    """Return a network with adapters of a rank, or of a layer's full rank where that is less."""
    ranks = {name: min(rank, *layer.weight.shape) for name, layer in linear_layers(network).items()}
    return lora.adapt(network, ranks, alpha=alpha, seed=seed)


def last_layer(network: nn.Module, seed: int) -> nn.Module:
    """Freeze all layers of a network but the last."""
    *others, _ = linear_layers(network).values()
    for layer in others:
        layer.requires_grad_(False)
    return network


def started(bench: Bench, seed: int, *, fresh: Callable[[int], nn.Module]) -> nn.Module:
    """Return a fresh network of a kind."""
    return fresh(seed)


def compressed(bench: Bench, seed: int, *, teacher: Arm, rate: float, share: float) -> nn.Module:
    """Return a network that this seed has trained, compressed to a share of its parameters."""
    return compress(bench.taught(teacher, rate, seed), bench.data, share, task="classification")[0]


def fitted(
    bench: Bench, seed: int, *, budget: int, shares: Sequence[float], n_images: int, teacher: Arm, rate: float
) -> nn.Module:
    """Return a dense network that this seed has trained, cut by factors that fit its outputs, with ranks by shares."""
    network = bench.taught(teacher, rate, seed)
    *hidden, last = linear_layers(network)
    moments = factorization.input_moments(network, bench.data.train_images[:n_images], hidden)
    svds = factorization.decompose(network, moments)
    rest = linear_layers(network)[last].weight.numel()
    layers = layers_of({name: svds[name] for name in hidden})
    return factorization.factorize(network, by_shares(layers, budget - rest, shares).ranks, svds)


def sparse(bench: Bench, seed: int, *, n_kept: int, teacher: Arm, rate: float) -> nn.Module:
    """Return a dense network that this seed has trained, with all but its largest weights held at zero."""
    return pruned(bench.taught(teacher, rate, seed), n_kept)


def born(
    bench: Bench, seed: int, *, widths: Sequence[int], activation: str, budget: int, shares: Sequence[float]
) -> nn.Module:
    """Return a network of freshly drawn factors, with ranks by shares."""
    network = mlp(widths, activation, seed=seed)
    *hidden, last = linear_layers(network)
    svds = factorization.decompose(network)
    layers = layers_of({name: svds[name] for name in hidden})
    ranks = by_shares(layers, budget - linear_layers(network)[last].weight.numel(), shares).ranks
    return factorization.factorize_standard(network, ranks, seed=seed)


def adaptive(
    bench: Bench, seed: int, *, widths: Sequence[int], activation: str, ranks: int, tolerance: float
) -> nn.Module:
    """Return a fresh network whose hidden layers find their ranks while they are trained, from these on."""
    network = mlp(widths, activation, seed=seed)
    *hidden, _ = linear_layers(network).items()
    start = {name: min(ranks, *layer.weight.shape) for name, layer in hidden}
    return dlrt.rank_adaptive(factorization.factorize(network, start), tolerance)


def answered(bench: Bench, seed: int, *, teacher: Arm, rate: float) -> Dataset:
    """Return the data with the answers of a network that this seed has trained in place of training labels."""
    logits = predict(bench.taught(teacher, rate, seed), bench.data.train_images, bench.precision)
    return replace(bench.data, train_labels=logits.softmax(dim=1))


def shifted(bench: Bench, seed: int) -> Dataset:
    """Return the data with every training image twice, as it is and moved by a pixel."""
    return bench.data.with_shifted(seed=seed)


def by_layer(network: nn.Module, ranks: Sequence[int]) -> dict[str, int]:
    """Name the layers that the ranks are of."""
    return dict(zip(linear_layers(network), ranks, strict=False))


def arms_of_02() -> dict[str, Arm]:
    """Train the small network for each number of epochs that the notebook weighs."""
    p = declared(notebook_path("02_train"))
    start = partial(dense, widths=p["widths"], activation=p["activation"])
    return {f"{epochs} epochs": Arm(start, epochs, p["batch_size"]) for epochs in (3, 5, 8)}


def arms_of_06() -> dict[str, Arm]:
    """Dense, factorised and tuned networks, and a small network at a low rank."""
    p = declared(notebook_path("06_factorized"))
    small = {"widths": p["widths"], "activation": p["activation"], "ranks": [p["low_rank"]] * (len(p["widths"]) - 2)}
    big = {"widths": p["big_widths"], "activation": p["activation"]}
    effective = [25, 25, 25, 25]  # about what seeds find; the notebook finds its own
    narrow = [784, 151, 151, 75, 37, 10]  # no more parameters than these
    # Shares of 5 % of the dense parameters: more for the first layers, and alike.
    small_shapes = [19, 19, 19, 19], [30, 18, 10, 10], [36, 14, 10, 10], [42, 10, 8, 8]
    arm = partial(Arm, epochs=p["factorized_epochs"], batch_size=p["batch_size"])
    longer = partial(Arm, epochs=p["factorized_epochs"] + p["tuning_epochs"], batch_size=p["batch_size"])
    low = partial(Arm, epochs=p["low_epochs"], batch_size=p["batch_size"])
    tuned = partial(Arm, epochs=p["tuning_epochs"], batch_size=p["batch_size"])
    teacher = arm(partial(dense, **big))
    cut_from = partial(cut, teacher=teacher, rate=p["dense_learning_rate"])
    return {
        "dense": teacher,
        "narrow": arm(partial(dense, widths=narrow, activation=p["activation"])),
        "effective": arm(partial(standard, ranks=effective, **big)),
        "effective, longer": longer(partial(standard, ranks=effective, **big)),
        "effective, tuned": tuned(partial(cut_from, ranks=effective)),
        **{
            f"small {'-'.join(map(str, ranks))}, tuned": tuned(partial(cut_from, ranks=ranks)) for ranks in small_shapes
        },
        "published, longer": longer(partial(standard, ranks=p["ranks"], **big)),
        "published, longer, batch 256": longer(partial(standard, ranks=p["ranks"], **big), batch_size=256),
        "low, standard": low(partial(standard, **small)),
        "low, spectral": low(partial(spectral, **small)),
        **{
            f"low, {kind} {strength:g}": low(partial(standard, **small), penalty={kind: strength})
            for kind in ("weight_decay", "frobenius_decay")
            for strength in STRENGTHS
        },
    }


def arms_of_07() -> dict[str, Arm]:
    """Networks of several widths, with all weights trained and in a subspace of middle size."""
    p = declared(notebook_path("07_conclusions"))
    dimension = p["subspace_dimensions"][len(p["subspace_dimensions"]) // 2]
    arm = partial(Arm, epochs=p["subspace_epochs"], batch_size=p["batch_size"])
    arms = {}
    for width in p["subspace_widths"]:
        network = {"widths": [784, width, width, 10], "activation": p["activation"]}
        arms[f"all weights, width {width}"] = arm(partial(dense, **network))
        arms[f"subspace, width {width}"] = arm(partial(subspace, dimension=dimension, **network), rates=SUBSPACE_RATES)
    return arms


def arms_of_08() -> dict[str, Arm]:
    """Train small networks of all kinds at the notebook's sizes, and tune the smallest with even shares as well."""
    p = declared(notebook_path("08_frontier"))
    big = {"widths": p["big_widths"], "activation": p["activation"]}
    least, middle, most = p["tuned_budgets"][0], *p["tuned_budgets"][-2:]
    even = [0.29, 0.33, 0.25, 0.13]  # about equal ranks
    teacher = Arm(partial(dense, **big), p["factorized_epochs"], p["batch_size"])
    taught = {"teacher": teacher, "rate": p["dense_learning_rate"]}

    def cut_to(budget: int, shares: Sequence[float] = p["layer_shares"]) -> Callable[[Bench, int], nn.Module]:
        return partial(fitted, budget=budget, shares=shares, n_images=p["moment_images"], **taught)

    arm = partial(Arm, epochs=p["factorized_epochs"], batch_size=p["small_batch_size"])
    tuned, scratch = partial(arm, rates=FINE_TUNING_RATES), partial(arm, rates=FEW_EPOCHS_RATES)
    arms = {f"tuned {budget}": tuned(cut_to(budget)) for budget in p["tuned_budgets"]}
    arms[f"tuned {least}, even"] = tuned(cut_to(least, even))
    arms[f"distilled {middle}"] = tuned(cut_to(middle), select=partial(answered, **taught))
    for budget in (least, middle, most):
        arms[f"shifted {budget}"] = replace(tuned(cut_to(budget), select=shifted), epochs=p["shifted_epochs"])
    for budget in (least, middle):
        arms[f"born {budget}"] = scratch(partial(born, budget=budget, shares=p["layer_shares"], **big))
        arms[f"narrow {budget}"] = scratch(
            partial(dense, widths=narrow_widths(p["big_widths"], budget), activation=p["activation"])
        )
    arms[f"pruned {least}"] = scratch(partial(sparse, n_kept=least, **taught))
    found = partial(adaptive, ranks=p["adaptive_rank"], tolerance=p["adaptive_tolerances"][-1], **big)
    arms["DLRT"] = replace(scratch(found), batch_size=p["batch_size"])
    return arms


def arms_of_bonus() -> dict[str, Arm]:
    """Ways to learn a digit that the network has not seen: all weights, the last layer's, adapters of several ranks."""
    p = declared(notebook_path("bonus_lora"))
    digit = p["held_out_digit"]
    teacher = Arm(
        partial(dense, widths=p["widths"], activation=p["activation"]),
        p["epochs"],
        p["batch_size"],
        select=partial(nine_digits, digit=digit),
    )

    mixed = partial(rehearsed, digit=digit, n_kept=p["rehearsal"], share=p["rehearsal_share"])

    def arm(change: Callable[[nn.Module, int], nn.Module]) -> Arm:
        start = partial(fine_tuned, teacher=teacher, rate=p["learning_rate"], change=change)
        return Arm(start, p["adapter_epochs"], p["batch_size"], select=mixed, rates=FINE_TUNING_RATES)

    return {
        "full": arm(lambda network, seed: network),
        "last layer": arm(last_layer),
        **{
            f"LoRA, rank {rank}": arm(partial(adapted, rank=rank, alpha=p["alpha"]))
            for rank in sorted({p["rank"], *p["adapter_ranks"]})
        },
    }


def arms_of_09() -> dict[str, Arm]:
    """Train a convolutional network and a transformer, and tune both after they have been compressed."""
    p = declared(notebook_path("09_your_network"))
    starts = {
        "convnet": lambda seed: convnet(p["channels"], p["convnet_width"], seed=seed),
        "transformer": lambda seed: VisionTransformer(
            patch=p["patch"], width=p["token_width"], n_blocks=p["n_blocks"], seed=seed
        ),
    }
    arms = {}
    for kind, fresh in starts.items():
        start = partial(started, fresh=fresh)
        dense = arms[kind] = Arm(start, p["few_epochs"], p["batch_size"], rates=FEW_EPOCHS_RATES)
        small = partial(compressed, teacher=dense, rate=p[f"{kind}_learning_rate"], share=p["small_share"])
        arms[f"{kind}, tuned"] = Arm(small, p["short_tuning_epochs"], p["batch_size"], rates=SHORT_TUNING_RATES)
    return arms


ARMS: dict[str, Callable[[], dict[str, Arm]]] = {
    "02": arms_of_02,
    "06": arms_of_06,
    "07": arms_of_07,
    "08": arms_of_08,
    "bonus": arms_of_bonus,
    "09": arms_of_09,
}  # by notebook


def all_arms() -> dict[str, Arm]:
    """Return every arm by its name, ``notebook/arm``."""
    return {f"{notebook}/{name}": arm for notebook, arms in ARMS.items() for name, arm in arms().items()}


def chosen(table: pd.DataFrame) -> pd.Series:
    """Return for each arm the rate whose accuracy is highest in the mean over seeds; of equals the lowest."""
    return table.pivot_table("validation_accuracy", "arm", "learning_rate").idxmax(axis="columns")


def read(file: Path) -> pd.DataFrame:
    """Read the table; without a file it is empty."""
    columns = [*KEY, "validation_accuracy", "validation_loss"]
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=columns)


def add(row: dict[str, float | str], file: Path) -> None:
    """Add a row to the table, in place of one with the same key; others may be adding theirs."""
    with FileLock(Path(tempfile.gettempdir()) / f"{file.name}.lock"):
        table = pd.concat([frame for frame in (read(file), pd.DataFrame([row])) if len(frame)])
        table = table.drop_duplicates(KEY, keep="last").sort_values(KEY)
        write_atomically(file, table.to_csv(index=False, float_format="%g").encode())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1)
@click.option("--data-dir", default="", help="Folder with torchvision's layout; else LOWRANK_DATA_DIR, then data/.")
@click.option(
    "--networks",
    type=click.Path(file_okay=False, path_type=Path),
    default=PROJECT / "reports" / "rates",
    show_default="reports/rates",
    help="Where trained networks are kept.",
)
@click.option("--list", "only_list", is_flag=True, help="Show the arms, with the rate chosen so far, and stop.")
def main(names: tuple[str, ...], data_dir: str, networks: Path, only_list: bool) -> None:
    """Train arms at every rate of the grid and add their scores on validation images to sweeps/rates.csv.

    NAMES are arms or patterns such as '06/*'; without any, all. What the table has is not trained again: stop when
    you like and go on with the same command.
    """
    arms = {name: arm for name, arm in all_arms().items() if any(fnmatch(name, wanted) for wanted in names or "*")}
    if not arms:
        raise click.UsageError(f"no arm is called {' or '.join(names)}; there are {', '.join(all_arms())}")
    if only_list:
        rates = chosen(read(TABLE))
        for name, arm in arms.items():
            click.echo(f"{name:32} {arm.epochs} epochs  {rates.get(name, '')}")
        return
    table = read(TABLE)
    done = set(table[KEY].itertuples(index=False, name=None))
    missing = [
        key
        for name, arm in arms.items()
        for rate in arm.rates
        for seed in SEEDS
        if (key := (name, rate, arm.epochs, seed)) not in done
    ]
    take_one_thread_each()
    os.environ["TQDM_DISABLE"] = "1"  # the bars of single trainings
    bench = Bench(data_dir, networks)
    bar = tqdm(total=len(missing), unit="network", disable=False)

    def score(key: tuple[str, float, int, int], stop: Event) -> None:
        name, rate, _, seed = key
        arm = arms[name]
        recipe = Recipe(arm.epochs, arm.batch_size, rate, seed=seed, precision=bench.precision, **arm.penalty)
        history = bench.train(arm.start(bench, seed), arm.select(bench, seed), recipe, stop)
        result = history.final("validation")
        row = dict(zip(KEY, key, strict=True))
        add(row | {"validation_accuracy": result.accuracy, "validation_loss": result.loss}, TABLE)
        bar.update()

    side_by_side([partial(score, key) for key in missing], bench.device)
    bar.close()


if __name__ == "__main__":
    main()
