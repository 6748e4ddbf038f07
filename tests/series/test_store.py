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
from IPython.core.interactiveshell import InteractiveShell
from torch.nn.utils import prune
from traitlets.config import Config

from lowrank_helpers import PROJECT, models, training
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


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


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


@pytest.mark.parametrize("build", [pruned, tied, lambda: torch.nn.Sequential(torch.nn.RNN(784, 4), Last())])
def test_networks_of_other_kinds_are_kept_too(few, tmp_path, build):
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(build())
        trained(tmp_path, networks[-1], few, RECIPE)
    assert torch.equal(*map(weights_of, networks))
    assert len(list(tmp_path.iterdir())) == 1


class Last(torch.nn.Module):
    """A recurrent network's last layer."""

    def forward(self, found):
        return found[0].repeat(1, 3)[:, :10]


def test_another_training_has_another_key(few):
    def of(model=None, data=few, recipe=RECIPE, others=None):
        return digest.of_json(determinants(model or mlp([784, 8, 10], seed=0), data, recipe, others or {}))

    shuffled = few.select(train=torch.arange(len(few.train_labels)))  # a copy
    shuffled.train_labels[:] = shuffled.train_labels.flip(0)  # in place, as a student does
    different = [
        of(),
        of(mlp([784, 8, 10], seed=1)),
        of(mlp([784, 8, 10], "tanh", seed=0)),
        of(data=shuffled),
        of(data=few.select(train=torch.arange(50))),
        of(recipe=replace(RECIPE, learning_rate=2e-3)),
        of(recipe=replace(RECIPE, seed=1)),
        of(others={"first": few}),
    ]
    assert len(set(different)) == len(different) and of() == different[0]


@pytest.fixture(scope="module")
def cells():
    """Run cells as a notebook does, each in what those before it left."""
    main = sys.modules["__main__"]
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))

    def run(*sources: str):
        for source in sources:
            shell.run_cell(source).raise_error()
        return shell.user_ns

    yield run
    sys.modules["__main__"] = main


SETUP = """
from functools import partial
from types import MethodType
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn import functional as F
from lowrank_helpers import models
from lowrank_helpers.layers import factorize

SCALE = 0.5
def squash(x):
    return torch.tanh(x) * SCALE
"""
NET = """
class Net(nn.Module):
    \"\"\"A network.\"\"\"
    shift = 0.0
    def __init__(self, power=1.0, inner=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fc = nn.Linear(784, 10, bias=False)
        self.fc.weight.data = torch.rand(10, 784, generator=generator) / 100
        self.power, self.inner = power, inner
        self.register_buffer("mask", torch.ones(784), persistent=False)
    def forward(self, x):
        # Everything that decides the answers.
        y = (self.inner or squash)(self.fc(x * self.mask)) * self.power + self.shift
        return y if self.training else y * 1.0
def closure(factor):
    return lambda x: x * factor
model = Net()
"""
FACTORS = 'model = factorize(models.mlp([784, 16, 10], seed=0), {"fc1": 8})'
ATTENTION = "model = models.VisionTransformer(width=8, n_blocks=1, n_heads=4, seed=0)"
LAYERS = (
    "torch.manual_seed(0)\nmodel = nn.Sequential(nn.Linear(784, 10), nn.BatchNorm1d(10), nn.Dropout(0.1), nn.ReLU())"
)

# What a student changes, and that is all: the cells before, and the cells after.
CHANGES = {
    "class attribute": (NET, "Net.shift = 1.0\nmodel = Net()"),
    "method that scoring calls": (NET.replace("y * 1.0", "y.sin()"), NET.replace("y * 1.0", "y.cos()")),
    "edited forward of scoring": (NET, NET.replace("y * 1.0", "y * 2.0")),
    "edited constant": (NET, "SCALE = 0.25\nmodel = Net()"),
    "edited function": (NET, "def squash(x):\n    return torch.sin(x)\nmodel = Net()"),
    "attribute": (NET, "model.power = 3"),
    "non-persistent buffer": (NET, "model.mask[7] = 0"),
    "lambda": (NET + "model.inner = lambda x: x", "model.inner = lambda x: -x"),
    "closure": (NET + "model.inner = closure(1)", "model.inner = closure(2)"),
    "partial": (NET + "model.inner = partial(torch.mul, other=1)", "model.inner = partial(torch.mul, other=2)"),
    "forward of one network": (NET, "model.forward = lambda x: model.fc(x)"),
    "method of one network": (
        NET + "def scored(self, x):\n    return x\nmodel.inner = MethodType(scored, model)",
        "def scored(self, x):\n    return x if self.training else 0 * x\nmodel.inner = MethodType(scored, model)",
    ),
    "hook for scoring": (NET, "model.register_forward_hook(lambda model, inputs, y: y if model.training else 2 * y)"),
    "hook on a gradient": (NET, "model.fc.weight.register_hook(lambda g: g / 2)"),
    "parametrization": (NET, "nn.utils.parametrizations.weight_norm(model.fc)"),
    "frozen": (ATTENTION, "model.embed.requires_grad_(False)"),
    "default dtype": (NET, "torch.set_default_dtype(torch.float64)"),
    "library's function": (NET, "torch.tanh = torch.sigmoid"),
    "heads": (ATTENTION, ATTENTION.replace("n_heads=4", "n_heads=8")),
    "package's method": (FACTORS, "models.LowRankLayer.forward = lambda self, x: self[1](self[0](2 * x))"),
    "dropout": (LAYERS, LAYERS.replace("Dropout(0.1)", "Dropout(0.1000001)")),
    "state of random numbers": (LAYERS, LAYERS + "\ntorch.manual_seed(1)"),
    "slope": (LAYERS, LAYERS.replace("ReLU()", "LeakyReLU(0.0)")),
}
HOOK = "model.register_forward_hook(hook)"
SAME = {
    "executed again": (NET, NET),
    "commented": (NET, NET.replace("Everything", "All").replace("A network.", "Some network.\n\n    And more.")),
    "laid out": (NET, NET.replace("self.fc(x * self.mask)", "self.fc(\n            x * self.mask\n        )")),
    "other names around it": (NET, "unused = 3\nmodel = Net()"),
    "mode": (LAYERS, "model.eval()"),
    "something else in the environment": (
        NET + "import os\nmodel.inner = lambda x: x if 'SHOUT' in os.environ else -x",
        "os.environ['WHISPER'] = '1'",
    ),
    "hook taken off": (NET, "model.register_forward_hook(lambda model, inputs, y: 2 * y).remove()"),
    "hooks numbered otherwise": (
        f"{NET}def hook(model, inputs, y):\n    return 2 * y\n{HOOK}",
        f"model = Net()\n{HOOK}.remove()\n{HOOK}",
    ),
}


@pytest.mark.parametrize("name", [*CHANGES, *SAME])
def test_what_a_student_changes_makes_another_network_and_what_changes_nothing_finds_it(cells, few, monkeypatch, name):
    before, after = (CHANGES | SAME)[name]
    for place, patched in ((torch, "tanh"), (models.LowRankLayer, "forward")):
        monkeypatch.setattr(place, patched, getattr(place, patched))  # it is so again at the end
    try:
        first = determinants(cells(SETUP, before)["model"], few, RECIPE, {})
        assert (determinants(cells(after)["model"], few, RECIPE, {}) == first) is (name in SAME)
    finally:
        torch.set_default_dtype(torch.float32)


CHANGED = "training changed more of it than its state_dict"
HOLDING = NET + "model.secret = lambda x: held\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (f"import threading\nheld = threading.Lock()\n{HOLDING}", "secret.held is a lock"),
        (f"held = (i for i in range(3))\n{HOLDING}", "secret.held is a generator"),
        (f"held = get_ipython()\n{HOLDING}", "secret.held"),
        ("import random\n" + NET.replace("+ self.shift", "+ random.random()"), "it answers differently each time"),
        (NET.replace("return y if", "self.power *= 0.99\n        return y if"), CHANGED),
        (NET.replace("return y if", "self.made = iter(int, 1)\n        return y if"), CHANGED),
    ],
)
def test_what_cannot_be_known_is_trained_and_not_kept(cells, few, tmp_path, source, said):
    for _ in range(2):
        model = cells(SETUP, source)["model"]
        before = model.fc.weight.clone()
        with pytest.warns(UserWarning, match=f"not kept, as .*{said}"):
            trained(tmp_path, model, few, RECIPE)
        assert not torch.equal(model.fc.weight, before)
    assert not list(tmp_path.iterdir())


def test_the_key_leaves_everything_as_it_is(cells, few):
    model = cells(SETUP, LAYERS)["model"].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].train()
    own = cells(NET, "model.forward = lambda x: model.fc(x)")["model"]
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    assert determinants(model, few, RECIPE, {}) == determinants(model, few, RECIPE, {})
    determinants(own, few, RECIPE, {})
    assert own.fc.weight.grad is None, "though a copy of its forward uses the network itself"
    assert [layer.training for layer in model.modules()] == [False, False, True, False, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_key_is_of_the_code_that_trains_and_of_the_device(few, monkeypatch):
    model = mlp([784, 8, 10], seed=0)
    before = determinants(model, few, RECIPE, {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda self: None)
        assert determinants(model, few, RECIPE, {}) == before, "PyTorch's own code is its version's"
        patch.setattr(torch, "__version__", "0.0")
        assert determinants(model, few, RECIPE, {}) != before
    for module, name in ((training, "batches"), (torch.optim, "Adam"), (training, "SCORED_AT_END")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *given, **options: iter(()))
            assert determinants(model, few, RECIPE, {}) != before, name
    assert before["device"] == "cpu"


def test_keys_are_the_same_in_another_process(few):
    says = """
        import torch
        from lowrank_helpers import data, layers, models
        from lowrank_helpers.series import digest, store
        from lowrank_helpers.training import Recipe
        torch.set_num_threads(1)
        few = data.load("digits").select(train=torch.arange(100), test=torch.arange(100))
        factors = layers.factorize(models.mlp([784, 16, 10], seed=0), {"fc1": 8})
        several = [factors, models.VisionTransformer(width=8, n_blocks=1, seed=0)]
        several[1].names = {"in", "any", "order"}
        keys = [digest.of_json(store.determinants(network, few, Recipe(1, 64, 1e-3), {})) for network in several]
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
def test_digest_of_science_follows_what_a_notebook_imports_also_by_way_of_others(module, follows, monkeypatch):
    notebook = evidence.source_of("02_train")
    before = digest.of_science(notebook)
    name = f"lowrank_helpers.{module}"
    monkeypatch.setitem(digest.SOURCES, name, f"{digest.SOURCES[name]}\nchanged = True")
    assert (digest.of_science(notebook) != before) == follows


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
