"""What is stored must come back as it was saved, or be recognised as damaged: never as something else."""

import copy
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import weights_of
from torch import nn
from torch.nn.utils import prune

from lowrank_helpers import PROJECT, models
from lowrank_helpers.data import Dataset
from lowrank_helpers.models import mlp
from lowrank_helpers.series import digest, evidence
from lowrank_helpers.series.store import determinants, trained, write_atomically
from lowrank_helpers.training import History, Recipe

RECIPE = Recipe(epochs=1, batch_size=64, learning_rate=1e-3)


@pytest.fixture(scope="module")
def few(digits) -> Dataset:
    """A hundred digits: training takes milliseconds."""
    return digits.select(train=torch.arange(100), test=torch.arange(100))


def train(folder: Path, data: Dataset, *, seed: int = 0) -> tuple[torch.Tensor, History]:
    model = mlp([784, 8, 10], seed=seed)
    history = trained(folder, model, data, RECIPE)
    return weights_of(model), history


@pytest.fixture(scope="module")
def saved(few, tmp_path_factory) -> tuple[Path, torch.Tensor, History]:
    """A folder with one network, and what its training gave."""
    folder = tmp_path_factory.mktemp("networks")
    weights, history = train(folder, few)
    return next(folder.iterdir()), weights, history


def pruned():
    model = mlp([784, 10, 10], seed=0)
    prune.l1_unstructured(model.fc1, "weight", amount=0.5)  # it computes the weight at each pass
    return model


def tied():
    model = mlp([784, 10, 10, 10], seed=0)
    model.fc3.weight = model.fc2.weight
    return model


@pytest.mark.parametrize("build", [pruned, tied])
def test_networks_of_other_kinds_are_kept_too(few, tmp_path, build):
    networks = [build(), build()]
    for network in networks:
        trained(tmp_path, network, few, RECIPE)
    assert torch.equal(*map(weights_of, networks))
    assert len(list(tmp_path.iterdir())) == 1


def key(model=None, data=None, recipe=RECIPE, others=None):
    return digest.of_json(determinants(model or mlp([784, 8, 10], seed=0), data, recipe, others or {}))


def test_another_training_has_another_key(few):
    different = [
        key(data=few),
        key(mlp([784, 8, 10], seed=1), few),
        key(mlp([784, 8, 10], "tanh", seed=0), few),
        key(data=few.select(train=torch.arange(50))),
        key(data=few, recipe=replace(RECIPE, learning_rate=2e-3)),
        key(data=few, recipe=replace(RECIPE, seed=1)),
        key(data=few, others={"first": few}),
    ]
    assert len(set(different)) == len(different) and key(data=few) == different[0]


def net(p=0.1, slope=0.01):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 10), nn.BatchNorm1d(10), nn.Dropout(p), nn.LeakyReLU(slope))


def attention(n_heads=4):
    return models.LanguageModel(10, width=8, n_blocks=1, n_heads=n_heads, seed=0)


CHANGES = {
    "dropout": lambda: net(p=0.1000001),
    "slope": lambda: net(slope=0.0100001),
    "state of random numbers": lambda: (net(), torch.manual_seed(1))[0],
    "running mean": lambda: (model := net(), model[1].running_mean.add_(1))[0],
    "parametrization": lambda: (model := net(), nn.utils.parametrizations.weight_norm(model[0]))[0],
    "frozen": lambda: (model := net(), model[0].bias.requires_grad_(False))[0],
}
SAME = {
    "built again": net,
    "mode": lambda: net().eval(),
    "hook taken off": lambda: (model := net(), model.register_forward_hook(lambda *_: None).remove())[0],
}


@pytest.mark.parametrize("name", [*CHANGES, *SAME])
def test_a_changed_network_has_another_key_and_the_same_one_has_the_same(few, name):
    first, second = (key(build(), few) for build in (net, (CHANGES | SAME)[name]))
    assert (first == second) is (name in SAME)


def test_what_no_layer_prints_the_version_and_the_device_are_in_the_key(few, monkeypatch):
    digits = few.train_labels.view(10, 10)
    text = replace(few, train_images=digits, train_labels=digits)
    assert key(attention(), text) != key(attention(n_heads=8), text)
    keys = [key(data=few)]
    for owner, name, other in ((nn.ReLU, "forward", lambda self, x: x.abs()), (torch, "__version__", "0.0")):
        monkeypatch.setattr(owner, name, other)
        keys.append(key(data=few))
    assert len(set(keys)) == 3
    assert determinants(net(), few, RECIPE, {})["device"] == "cpu"


class Own(nn.Linear):
    """A layer that a student wrote, and may rewrite."""


FOREIGN = {
    "a layer": lambda: nn.Sequential(Own(784, 10)),
    "a forward": lambda: (model := net(), setattr(model[3], "forward", lambda x: x))[0],
    "a hook": lambda: (model := net(), model.register_forward_hook(lambda *_: None))[0],
    "a hook on a gradient": lambda: (model := net(), model[0].weight.register_hook(lambda g: g / 2))[0],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_network_with_code_of_no_known_version_is_trained_and_not_kept(few, tmp_path, name):
    for _ in range(2):
        model = FOREIGN[name]()
        before = weights_of(model)
        with pytest.warns(UserWarning, match="not kept, as the code of .*(Own|lambda).* is neither PyTorch's nor"):
            trained(tmp_path, model, few, RECIPE)
        assert not torch.equal(weights_of(model), before)
    assert not list(tmp_path.iterdir())


def test_the_key_leaves_everything_as_it_is(few):
    model = net().eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].train()
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    assert key(model, few) == key(model, few)
    assert [layer.training for layer in model.modules()] == [False, False, True, False, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_are_the_same_in_another_process(few):
    says = """
        from dataclasses import replace
        import torch
        from lowrank_helpers import data, layers, models
        from lowrank_helpers.series import digest, store
        from lowrank_helpers.training import Recipe
        torch.set_num_threads(1)
        few = data.load("digits").select(train=torch.arange(100), test=torch.arange(100))
        factors = layers.factorize(models.mlp([784, 16, 10], seed=0), {"fc1": 8})
        language = models.LanguageModel(10, width=8, n_blocks=1, seed=0)
        digits = few.train_labels.view(10, 10)
        text = replace(few, train_images=digits, train_labels=digits)
        several = [(factors, few), (language, text)]
        keys = [digest.of_json(store.determinants(*each, Recipe(1, 64, 1e-3), {})) for each in several]
        print(*keys)
    """
    code = textwrap.dedent(says)
    here: dict = {}
    exec(code, here)
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.split() == here["keys"]


CODE = 'def order(n):\n    """Return the order."""\n    # Any will do.\n    return list(range(n))'
SAME_CODE = {"Return the order.": "Say.", '    """Return the order."""\n': "", "# Any will do.": "# Not any."}
OTHER_CODE = {"range(n)": "range(n, 0, -1)", "def order(n):": "def order(n, seed=0):", "Any": "Any"}


@pytest.mark.parametrize(
    "module, follows", [("training", True), ("cuda_graphs", True), ("lora", False), ("series.run", False)]
)
def test_keys_and_evidence_follow_the_science_that_is_imported_also_by_way_of_others(few, monkeypatch, module, follows):
    notebook = evidence.source_of("02_train")
    before = digest.of_science(notebook), key(data=few)
    name = f"lowrank_helpers.{module}"
    monkeypatch.setitem(digest.SOURCES, name, f"{digest.SOURCES[name]}\nchanged = True")
    after = digest.of_science(notebook), key(data=few)
    assert (before[0] != after[0], before[1] != after[1]) == (follows, follows)


def test_digest_of_cells_follows_what_code_does_and_not_what_it_says():
    def of(*change):
        return digest.of_cells(["%matplotlib inline\nx = 1", CODE.replace(*change)])

    assert {of(*change) for change in SAME_CODE.items()} == {of("", "")}
    assert len({of(*change) for change in OTHER_CODE.items()}) == 3
    cells = [["a = 1", "b = 2"], ["a = 1\nb = 2"], ["b = 2", "a = 1"], ["%time a = 1"], ["%time a = 2"], ["!ls"], []]
    assert len(set(map(digest.of_cells, cells))) == len(cells)


def recomputed(saved, few, folder: Path, content: bytes) -> None:
    """Expect a damaged file to be named in a warning, and the training done again with the same result."""
    file, weights, history = saved
    (folder / file.name).write_bytes(content)
    with pytest.warns(UserWarning, match=re.escape(file.name)):
        again, retrained = train(folder, few)
    assert torch.equal(again, weights)
    assert (retrained.loss, retrained.accuracy) == (history.loss, history.accuracy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(folder, few)


@given(permille=st.integers(0, 999), bit=st.integers(0, 7), part=st.sampled_from(["header", "all", "cut"]))
def test_damage_is_noticed_wherever_it_is(saved, few, tmp_path_factory, permille, bit, part):
    content = bytearray(saved[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = permille * (header if part == "header" else len(content)) // 1000
    if part == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << bit
    recomputed(saved, few, tmp_path_factory.mktemp("damaged"), bytes(content))


def test_file_of_another_network_is_trained_again(saved, few, tmp_path):
    train(tmp_path / "elsewhere", few, seed=1)
    recomputed(saved, few, tmp_path, next((tmp_path / "elsewhere").iterdir()).read_bytes())


def test_nothing_in_the_project_unpickles_but_tensors_of_a_file_to_analyse():
    unsafe = r"import pickle|pickle\.load|torch\.save|joblib|allow_pickle|read_pickle"
    forbidden = re.compile(unsafe + r"|torch\.load\((?!.*weights_only=True)")
    sources = [*PROJECT.glob("lowrank_helpers/**/*.py"), *PROJECT.glob("notebooks/*.ipynb")]
    assert len(sources) > 10
    assert [source.name for source in sources if forbidden.search(source.read_text())] == []


WRITER = """
import sys
from pathlib import Path
from lowrank_helpers.series.store import write_atomically
for i in range(10**6):
    write_atomically(Path(sys.argv[1]), bytes([i % 256]) * 3_000_000)
"""


def test_killed_writer_leaves_the_old_file_or_the_new(tmp_path):
    file = tmp_path / "file"
    for pause in (0.003, 0.017):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file)])
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if file.exists():
            content = file.read_bytes()
            assert len(content) == 3_000_000
            assert len(set(content)) == 1


def test_failed_write_leaves_no_trace(tmp_path):
    file = tmp_path / "file"
    file.mkdir()  # a folder in the way: the last step, the renaming, fails
    with pytest.raises(OSError, match="file"):
        write_atomically(file, b"new")
    assert list(tmp_path.iterdir()) == [file]
