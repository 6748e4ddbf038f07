"""Findings of the series say what their numbers say: cells run on made-up numbers, and on the numbers turned round."""

from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from lowrank_helpers.series.execution import notebook_path
from lowrank_helpers.statistics import compare
from lowrank_helpers.training import History

N_SEEDS = 5
NOISE = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])  # of a seed, far below every margin


def around(value: float) -> np.ndarray:
    return value + NOISE


def sources(notebook: str) -> dict[str, str]:
    return {cell.id: cell.source for cell in nbformat.read(notebook_path(notebook), as_version=4).cells}


def say(notebook: str, cell: str, **names) -> tuple[str, bool | None]:
    """Run a finding's cell with the notebook's imports and parameters and with these names; return what it says."""
    said = []

    class Run:
        whole_data = data = SimpleNamespace(
            train_labels=torch.zeros(60_000), test_labels=torch.zeros(10_000), name="mnist"
        )

        def finding(self, id, answer, evidence="", *, met=None, timings=None, **values):
            values |= timings or {}
            evidence.format(**values)  # every number that it names is there
            said.append((answer.format(**values), met))

    cells = sources(notebook)
    namespace = {}
    exec(cells["parameters"], namespace)
    exec(cells["setup"].split("\nrun = Run(")[0], namespace)
    namespace |= {"seeds": range(N_SEEDS), "run": Run()} | names
    exec(cells[cell], namespace)
    [found] = said
    return found


def histories(test: list[float], train_loss: float = 0.01, test_loss: float = 0.05) -> list[History]:
    epochs = [float(i) for i in range(len(test))]
    return [
        History(
            epochs,
            {
                "train": [2.3] * (len(test) - 1) + [train_loss + noise / 100],
                "test": [2.3] * (len(test) - 1) + [test_loss],
            },
            {"train": test, "test": [value + noise / 100 for value in test]},
            epochs,
        )
        for noise in NOISE
    ]


def test_02_whether_the_bar_is_cleared():
    assert "clears the bar" in say("02_train", "finding-2-1", histories=histories([0.1, 0.96, 0.98]))[0]
    answer, met = say("02_train", "finding-2-1", histories=histories([0.1, 0.9, 0.95]))
    assert "does not clear" in answer and met is False


def test_02_train_and_test_diverge_or_stay_together():
    def words(**losses):
        return say(
            "02_train",
            "finding-losses",
            histories=histories([0.1, 0.98], **losses),
            accuracy={"train": around(99), "test": around(98)},
        )[0]

    assert "diverge:" in words()
    assert "stay together" in words(test_loss=0.011)
    assert "undecided" in words(test_loss=0.03)


def test_02_an_accuracy_that_is_never_reached():
    def words(test):
        same = histories(test)
        return say("02_train", "finding-time", histories=same, history=same[0])[0]

    assert words([0.1, 0.97, 0.98]) == words([0.1, 0.79, 0.8]) == "Most of the way is gone within the first epoch."
    assert words([0.1, 0.5, 0.98]) == "The first epoch is not most of the way."


def ranks(numerical: float, effective: float, stable: float, **more: float) -> pd.DataFrame:
    columns = {"numerical rank": numerical, "effective rank": effective, "stable rank": stable} | more
    return pd.DataFrame({name: around(value) for name, value in columns.items()})


class FixedTables(SimpleNamespace):
    """Stands for the module ``rank``: gives tables, made up beforehand, in turn."""

    def rank_table(self, table):
        return table

    def weight_matrices(self, network):
        return network


def test_03_whether_training_lowers_the_measures():
    start = {"numerical rank": 100.0, "effective rank": 90.0, "stable rank": 40.0, "energy rank 90 %": 60.0}

    def words(**after):
        networks = {s: (pd.DataFrame([start | after]) * (1 + NOISE[s] / 10), None) for s in range(N_SEEDS)}
        return say(
            "03_rank", "finding-3-1", networks=networks, mlp=lambda widths, activation, seed: pd.DataFrame([start]),
            rank=FixedTables(), full={"fc1": 100}, layers=["fc1"],
        )[0]  # fmt: skip

    assert "full rank, as random ones have" in words(**{"effective rank": 70.0, "stable rank": 8.0})
    assert "directions fell" in words(**{"effective rank": 70.0, "stable rank": 8.0})
    assert "undecided" in words(**{"effective rank": 95.0, "stable rank": 8.0})
    assert "Not all weight matrices have full rank" in words(**{"numerical rank": 50.0})


@pytest.mark.parametrize(
    ("by_depth", "count", "word"),
    [
        ([40, 50, 60], 1.0, "lowers the stable rank at every depth, of early layers more than of late ones"),
        ([60, 50, 40], 1.0, "undecided"),
        ([40, 110, 60], 1.0, "undecided"),
        ([40, 50, 60], 0.5, "the numerical rank is not full"),
    ],
)
def test_03_depth(by_depth, count, word):
    kept = pd.DataFrame(
        [
            {"seed": s, "depth": depth, "measure": measure, "share of its start (%)": share + NOISE[s]}
            for s in range(N_SEEDS)
            for depth, share in enumerate(by_depth)
            for measure in ("stable rank", "effective rank")
        ]
    )
    assert word in say("03_rank", "finding-3-2", kept=kept, counted=pd.Series([count]))[0]


def test_03_activations():
    def table(effective, accuracy=98, numerical=100):
        return ranks(numerical, effective, 10, **{"train accuracy (%)": accuracy, "test accuracy (%)": accuracy})

    def words(cell, **of):
        names = {"of": of, "activations": list(of), "mean_full": 100}
        namespace = {}
        exec("from itertools import combinations\nfrom math import comb\nimport pandas as pd\n"
             "from lowrank_helpers.statistics import compare", namespace)  # fmt: skip
        exec(sources("03_rank")["pairs"], namespace := namespace | names)
        return say("03_rank", cell, **names, **{k: namespace[k] for k in ("pairs", "n_pairs", "margin")})[0]

    assert "depends on it" in words("finding-3-3", relu=table(80), sigmoid=table(50))
    assert "undecided" in words("finding-3-3", relu=table(80), sigmoid=table(80))
    assert "not full" in words("finding-3-3", relu=table(80, numerical=80), sigmoid=table(80))
    assert "worse than with any" in words("finding-accuracy", relu=table(80), identity=table(80, accuracy=92))
    assert "undecided" in words("finding-accuracy", relu=table(80, accuracy=92), identity=table(80))
    assert "undecided" in words("finding-accuracy", relu=table(80), gelu=table(80))


def overfitting(loss: list[float], accuracy: list[float], train: float = 1.0) -> dict:
    epochs = [float(i) for i in range(len(loss))]
    history = History(epochs, {"train": loss, "test": loss}, {"train": [train] * len(loss), "test": accuracy}, epochs)
    best = int(np.argmin(loss))
    return {
        "history": history, "best": best, "rise": loss[-1] / loss[best] - 1, "test": history.final("test"),
        "big_epochs": len(loss) - 1,
    }  # fmt: skip


def test_04_overfitting_and_mistakes():
    rising = [2.3, 0.1, 0.15]
    assert say("04_overfit", "finding-4-1", **overfitting(rising, [0.1, 0.97, 0.98]))[1]
    assert not say("04_overfit", "finding-4-1", **overfitting([2.3, 0.1, 0.11], [0.1, 0.97, 0.98]))[1]
    assert not say("04_overfit", "finding-4-1", **overfitting(rising, [0.1, 0.97, 0.98], train=0.9))[1]
    assert "become fewer" in say("04_overfit", "finding-disagree", **overfitting(rising, [0.1, 0.97, 0.98]))[0]
    assert "do not become fewer" in say("04_overfit", "finding-disagree", **overfitting(rising, [0.1, 0.98, 0.97]))[0]
    assert (
        "does not rise" in say("04_overfit", "finding-disagree", **overfitting([2.3, 0.2, 0.1], [0.1, 0.97, 0.98]))[0]
    )


@pytest.mark.parametrize(
    ("small", "one_epoch", "by_heart", "fell"),
    [(84, 91, 81, True), (84, 91, 101, False), (84, 99, 81, False), (101, 91, 81, False)],
)
def test_04_ranks_against_their_starts(small, one_epoch, by_heart, fell):
    rows = [
        {"network": network, "layer": layer, "seed": s, "effective rank": share + NOISE[s], "stable rank": 7}
        for network, share in (("small MLP", small), ("big MLP, one epoch", one_epoch), ("big, overfitted", by_heart))
        for layer in ("fc1", "fc2")
        for s in (range(N_SEEDS) if network != "big, overfitted" else [0])
    ]
    table = pd.DataFrame({"numerical rank": [100.0], "rows": [100], "columns": [120]})
    answer, _ = say("04_overfit", "finding-4-2", hidden=pd.DataFrame(rows), table=table, start=table)
    assert ("does not fill the rank up" in answer) is fell


def test_04_depth():
    def table(first, last):
        return pd.DataFrame(
            {"effective rank": [first, 50, last, 5], "rows": [100] * 3 + [10], "columns": 100},
            index=["fc1", "fc2", "fc3", "fc4"],
        )

    start = table(80, 90)
    assert "keeps more" in say("04_overfit", "finding-depth", table=table(60, 80), start=start)[0]
    assert "does not keep more" in say("04_overfit", "finding-depth", table=table(80, 60), start=start)[0]


@pytest.mark.parametrize(
    ("errors", "word"),
    [((1.0, 0.9, 0.8, 0.7, 0.0), "only where factors hold more"), ((1.0, 0.05, 0.0, 0.0, 0.0), "still save")],
)
def test_05_error_against_rank(errors, word):
    A = torch.eye(4)
    names = {
        "hidden": {"fc1": A},
        "optimum": {"fc1": [error * A.norm().item() for error in errors]},
        "ablation": pd.DataFrame([{"layer": "fc1", "rank": 1, "absolute": errors[1] * A.norm().item()}]),
        "by_layer": pd.DataFrame({("relative", "fc1"): errors}),
    }
    assert word in say("05_approximate", "finding-5-2", **names)[0]


@pytest.mark.parametrize(
    ("factors", "dense", "share", "words"),
    [
        (2.5, 1.0, 0.06, ("later", "multiplications, sooner")),
        (0.4, 1.0, 0.06, ("target sooner", "multiplications, sooner")),
        (1.0, 1.0, 1.0, ("at the same time", "multiplications, at the same time")),
        (2.5, np.nan, 0.06, ("Not all networks reach the target", "not decided")),
    ],
)
def test_06_time_to_a_target(factors, dense, share, words):
    needed = {"dense": around(dense), "rank 26": around(factors)}
    work = needed | {"rank 26": share * needed["rank 26"]}
    reached = {label: np.stack([times, times], axis=1) for label, times in needed.items()}
    answer, _ = say(
        "06_factorized", "finding-6-2", needed=needed, work=work, reached=reached, rank="rank 26", effective=26
    )
    assert all(word in answer for word in words), answer


@pytest.mark.parametrize(
    ("scratch", "tuned", "published", "words", "met"),
    [
        (97.5, 98.4, 98.4, ("are less accurate than the dense", "they are not clearly apart"), True),
        (98.5, 97.5, 97.7, ("are not clearly apart", "they are less accurate than"), False),
        (99.5, 99.5, 98.4, ("are more accurate than the dense", "they are more accurate than"), True),
    ],
)
def test_06_accuracy(scratch, tuned, published, words, met):
    values = {
        "dense": 98.5, "rank 26": scratch, "rank 26, tuned": tuned, "published ranks, 8 epochs": published,
    }  # fmt: skip
    accuracy = {split: {label: around(value) for label, value in values.items()} for split in ("train", "test")}
    answer, reached = say(
        "06_factorized", "finding-6-3", accuracy=accuracy, rank="rank 26", longer="8 epochs",
        tuned_label="rank 26, tuned", effective=26, parameters={"published": 872_800},
    )  # fmt: skip
    assert all(word in answer for word in words), answer
    assert reached == met


def test_07_what_training_adds():
    def words(half, most, gradient, numerical=98):
        spectra = {
            "change by training": (numerical, half, most), "first gradient": (90, 2, gradient),
            "Adam's first step": (100, 20, 70),
        }  # fmt: skip
        rows = [
            {"matrix": matrix, "layer": layer, "seed": s, "full": 100}
            | dict(zip(("numerical rank", "50%", "99%"), values, strict=True))
            for matrix, values in spectra.items()
            for s in range(N_SEEDS)
            for layer in ("fc1", "fc2")
        ]
        return say("07_conclusions", "finding-change", table=pd.DataFrame(rows))[0]

    assert "strong head on a tail" in words(half=5, most=60, gradient=10)
    assert "undecided" in words(half=30, most=60, gradient=10)
    assert "undecided" in words(half=5, most=60, gradient=90)
    assert "undecided" in words(half=5, most=60, gradient=10, numerical=50)


def test_07_intrinsic_dimension():
    def words(exponent):
        parameters = pd.Series({50: 1e4, 400: 1e5})
        rows = [
            {"split": split, "seed": s, "width": width, "d90": 500 * (size / 1e4) ** exponent * (1 + NOISE[s])}
            for split in ("train", "validation", "test")
            for s in range(N_SEEDS)
            for width, size in parameters.items()
        ]
        return say(
            "07_conclusions",
            "finding-intrinsic",
            parameters=parameters,
            d90=pd.DataFrame(rows),
            subspace_widths=[50, 400],
        )[0]

    assert "hardly depends" in words(0.05)
    assert "the more numbers" in words(0.5)
    assert "the fewer numbers" in words(-0.5)
    assert "undecided" in words(np.nan)


@pytest.mark.parametrize(("pruned", "word"), [(98.5, "more"), (96.5, "less"), (97.5, "as accurate as")])
def test_08_pruned_weights_against_factors(pruned, word):
    rows = [
        {"network": kind, "parameters": 60_000, "split": split, "seed": s, "accuracy": value}
        for kind, accuracy in (("tuned", 97.5), ("pruned, tuned", pruned))
        for split in ("train", "test")
        for s, value in enumerate(around(accuracy))
    ]
    helpers = {"compare": compare, "cut_budgets": [1, 2, 3]}
    exec(sources("08_frontier")["finding-8-1"].split("\nword, gain")[0], helpers)
    names = {name: helpers[name] for name in ("kept", "values")} | {"least": 60_000, "alike_within": 0.3}
    assert word in say("08_frontier", "finding-pruned", frontier=pd.DataFrame(rows), **names)[0]
