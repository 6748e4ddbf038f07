"""Choose the learning rates of recipes.yaml by the accuracy on MNIST's 10,000 validation images, or validation text.

For half of a recipe's rate, the rate and twice the rate, from seeds that neither notebooks nor evidence use, the
notebook that trains by this recipe is executed. There the validation data stand for the test set, and no network is
trained on them. sweeps/rates.csv has a row for each network. Where another rate is better, change the recipe and run
again.
"""

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from fnmatch import fnmatch
from io import StringIO
from typing import Any

import click
import matplotlib as mpl
import nbformat
import pandas as pd
from matplotlib import pyplot as plt
from torch import nn
from tqdm import tqdm

from lowrank_helpers import PROJECT, text
from lowrank_helpers.data import Dataset
from lowrank_helpers.series import execution, run
from lowrank_helpers.series.store import write_atomically
from lowrank_helpers.text import load_text
from lowrank_helpers.training import History, Recipe

NOTEBOOKS = {
    "02_train": ["small"],
    "06_factorized": ["factors", "narrow", "tuned", "low*"],
    "07_conclusions": ["all_weights", "subspace"],
    "08_frontier": ["pruned"],
    "09_your_network": ["*convnet", "*language_model"],
    "bonus_lora": ["lora", "full", "last_layer", "lora_plus", "rslora", "pissa", "dora"],
}  # where networks are trained by these recipes
SEEDS = (100, 101)
STEPS = (0.5, 1, 2)
TABLE = PROJECT / "sweeps" / "rates.csv"
KEY = ["recipe", "network", "learning_rate", "epochs", "seed"]
GIVEN = {"dataset": "mnist"}


def held(data: Dataset) -> Dataset:
    """Let validation data stand for the test set."""
    images, labels = data.splits()["validation"]
    return replace(data, test_images=images, test_labels=labels)


def held_text(*given: Any) -> tuple[Dataset, str]:
    """Load the language model's text likewise."""
    data, characters = load_text(*given)
    return held(data), characters


class Held(run.Run):
    """A run whose test set is the validation images, and which keeps how each network did on them."""

    def __init__(self, notebook: str, variables: Mapping[str, Any]) -> None:
        super().__init__(notebook, variables)
        self.data = held(self.data)
        self.made: list[tuple[str, Recipe]] = []
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    def recipe(self, kind: str, data: Dataset | None = None) -> Recipe:
        """Remember whose recipe it is."""
        self.made.append((kind, super().recipe(kind, data)))
        return self.made[-1][1]

    def train_all(
        self, trainings: Mapping[run.Key, run.Training], **options: Any
    ) -> dict[run.Key, tuple[nn.Module, History]]:
        """Keep a row of each; a network trained twice under one name, as for the bonus, counts the second time."""
        done = super().train_all(trainings, **options)
        for key, (_, recipe, _) in trainings.items():
            (kind,) = [kind for kind, made in self.made if made is recipe]
            network = ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
            values = (kind, network, recipe.learning_rate, recipe.epochs, recipe.seed)
            self.rows[kind, network] = dict(zip(KEY, values, strict=True)) | vars(done[key][1].final("test"))
        return done


def rows(notebook: str, recipe: str, learning_rate: float, seed: int) -> list[dict[str, Any]]:
    """Execute a notebook that trains by a recipe, at another rate, and return a row for each network of the recipe."""
    given = GIVEN | {"seed": seed, "recipes": {recipe: {"learning_rate": learning_rate}}}
    variables: dict[str, Any] = {"__name__": "__main__"}
    with redirect_stdout(StringIO()):
        for cell in nbformat.read(execution.notebook_path(notebook), as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{notebook}, {cell.id}", "exec"), variables)
                plt.close("all")
            if "parameters" in cell.metadata.get("tags", []):
                variables |= {name: value for name, value in given.items() if name in variables}
    return [row for row in variables["run"].rows.values() if row["recipe"] == recipe]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Measure rates around those of recipes: NAMES or patterns such as 'tuned_*'; without any, of all.

    What the table has is not measured again.
    """
    table = pd.read_csv(TABLE)
    done = set(table[["recipe", "learning_rate", "epochs", "seed"]].itertuples(index=False, name=None))
    jobs = [
        (notebook, kind, rate, seed)
        for notebook, patterns in NOTEBOOKS.items()
        for kind, recipe in run.recipes().items()
        if any(fnmatch(kind, pattern) for pattern in patterns) and any(fnmatch(kind, name) for name in names or "*")
        for step in STEPS
        for seed in SEEDS
        if (kind, rate := step * recipe["learning_rate"], recipe["epochs"], seed) not in done
    ]
    mpl.use("Agg")
    run.Run = Held  # type: ignore[misc]
    text.load_text = held_text
    with execution.run_folder(PROJECT / "reports" / "rates"):
        for job in tqdm(jobs, unit="notebook", disable=False):
            table = pd.concat([table, pd.DataFrame(rows(*job))]).drop_duplicates(KEY, keep="last").sort_values(KEY)
            write_atomically(TABLE, table.to_csv(index=False, float_format="%g").encode())


if __name__ == "__main__":
    main()
