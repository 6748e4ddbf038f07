"""What is stored must come back as it was saved, or be recognised as damaged: never as something else."""

import copy
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils import prune
from traitlets.config import Config

from lowrank_helpers import PROJECT, training
from lowrank_helpers.data import Dataset
from lowrank_helpers.models import mlp
from lowrank_helpers.series import digest, store
from lowrank_helpers.series.store import Store, write_atomically
from lowrank_helpers.training import History, Recipe

RECIPE = Recipe(epochs=1, batch_size=64, learning_rate=1e-3)


@pytest.fixture(scope="module")
def few(digits) -> Dataset:
    """A hundred digits: training takes milliseconds."""
    return digits.select(train=torch.arange(100), test=torch.arange(100))


def train(folder: Path, data: Dataset, recipe: Recipe = RECIPE, *, seed: int = 0) -> tuple[torch.Tensor, History]:
    model = mlp([784, 8, 10], seed=seed)
    history = Store(folder).trained(model, data, recipe)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]), history


@pytest.fixture(scope="module")
def saved(few, tmp_path_factory) -> tuple[Path, torch.Tensor, History]:
    """A store with one network, and what its training gave."""
    folder = tmp_path_factory.mktemp("networks")
    weights, history = train(folder, few)
    return next(folder.iterdir()), weights, history


def test_second_training_is_loaded(saved, few):
    file, weights, history = saved
    again, loaded = train(file.parent, few)
    assert torch.equal(again, weights)
    assert loaded == history, "the durations would differ had it been trained again"


def test_key_is_of_all_that_determines_a_training(saved, few, digits, tmp_path):
    train(tmp_path, few)
    train(tmp_path, few, seed=1)
    train(tmp_path, few, Recipe(epochs=1, batch_size=64, learning_rate=2e-3))
    train(tmp_path, few, Recipe(epochs=1, batch_size=64, learning_rate=1e-3, seed=1))
    train(tmp_path, digits.select(train=torch.arange(50), test=torch.arange(50)))
    frozen = mlp([784, 8, 10], seed=0)
    frozen.fc1.weight.requires_grad_(False)
    Store(tmp_path).trained(frozen, few, RECIPE)
    Store(tmp_path).trained(mlp([784, 8, 10], "tanh", seed=0), few, RECIPE)
    Store(tmp_path).trained(mlp([784, 8, 10], seed=0), few, RECIPE, others={"first": few})
    assert len(list(tmp_path.iterdir())) == 8


def test_data_changed_in_place_make_another_network(few, tmp_path):
    """A student shuffles the labels and trains: nobody must find that network under the true labels' key."""
    shuffled = few.select(train=torch.arange(len(few.train_labels)))  # a copy
    train(tmp_path, few)
    shuffled.train_labels[:] = shuffled.train_labels.flip(0)
    changed, _ = train(tmp_path, shuffled)
    again, _ = train(tmp_path, few)
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(changed, again)


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
import functools
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
    "constructor's argument": (NET, "model = Net(power=0.0)"),
    "class attribute": (NET, "Net.shift = 1.0\nmodel = Net()"),
    "edited forward": (NET, NET.replace("+ self.shift", "- self.shift - 1e-9")),
    "edited forward of scoring": (NET, NET.replace("y * 1.0", "y * 2.0")),
    "edited constant": (NET, "SCALE = 0.25\nmodel = Net()"),
    "edited function": (NET, "def squash(x):\n    return torch.sin(x)\nmodel = Net()"),
    "attribute set afterwards": (NET, "model = Net()\nmodel.power = 3"),
    "non-persistent buffer": (NET, "model = Net()\nmodel.mask[7] = 0"),
    "lambda": (NET + "model = Net(inner=lambda x: x)", "model = Net(inner=lambda x: -x)"),
    "closure": (NET + "model = Net(inner=closure(1))", "model = Net(inner=closure(2))"),
    "partial": (
        NET + "model = Net(inner=functools.partial(torch.mul, other=1))",
        "model = Net(inner=functools.partial(torch.mul, other=2))",
    ),
    "forward of one network": (
        NET,
        "model = Net()\nmodel.forward = lambda x: model.fc(x)",
    ),
    "hook": (NET, "model = Net()\nmodel.register_forward_hook(lambda model, inputs, y: 2 * y)"),
    "edited hook for scoring": (
        NET + "model.register_forward_hook(lambda model, inputs, y: y if model.training else 2 * y)",
        "model = Net()\nmodel.register_forward_hook(lambda model, inputs, y: y if model.training else 3 * y)",
    ),
    "hook on a gradient": (NET, "model = Net()\nmodel.fc.weight.register_hook(lambda g: g / 2)"),
    "parametrization": (NET, "model = Net()\nnn.utils.parametrizations.weight_norm(model.fc)"),
    "frozen": (ATTENTION, ATTENTION + "\nmodel.embed.requires_grad_(False)"),
    "default dtype": (NET, "model = Net()\ntorch.set_default_dtype(torch.float64)"),
    "library's function": (NET, "torch.tanh, tanh = torch.sigmoid, torch.tanh\nmodel = Net()"),
    "heads": (ATTENTION, ATTENTION.replace("n_heads=4", "n_heads=8")),
    "package's method": (
        FACTORS,
        "Thin = models.LowRankLayer\nforward = Thin.forward\nThin.forward = lambda self, x: 2 * forward(self, x)\n"
        + FACTORS,
    ),
    "momentum": (LAYERS, LAYERS.replace("BatchNorm1d(10)", "BatchNorm1d(10, momentum=0.5)")),
    "dropout": (LAYERS, LAYERS.replace("Dropout(0.1)", "Dropout(0.1000001)")),
    "state of random numbers": (LAYERS, LAYERS + "\ntorch.manual_seed(1)"),
    "slope": (LAYERS, LAYERS.replace("ReLU()", "LeakyReLU(0.0)")),
    "in place": (LAYERS, LAYERS.replace("ReLU()", "ReLU(inplace=True)")),
}
# What undoes such a change, or is none.
RESTORE = """
torch.set_default_dtype(torch.float32)
if "tanh" in globals(): torch.tanh = tanh
if "forward" in globals(): del Thin.forward
for name in ("tanh", "forward"): globals().pop(name, None)
"""
SAME = {
    "executed again": (NET, NET),
    "commented": (NET, NET.replace("Everything", "All").replace("A network.", "Some network.\n\n    And more.")),
    "laid out": (NET, NET.replace("self.fc(x * self.mask)", "self.fc(\n            x * self.mask\n        )")),
    "other names around it": (NET, "unused = 3\nmodel = Net()"),
    "own seed": (ATTENTION, ATTENTION),
    "mode": (LAYERS, LAYERS + "\nmodel.eval()"),
    "something else in the environment": (
        NET + "import os\ndef inner(x):\n    return x if 'SHOUT' in os.environ else -x\nmodel = Net(inner=inner)",
        "os.environ['WHISPER'] = '1'\nmodel = Net(inner=inner)",
    ),
    "hook taken off": (NET, "model = Net()\nmodel.register_forward_hook(lambda model, inputs, y: 2 * y).remove()"),
    "hooks numbered otherwise": (
        NET + "def hook(model, inputs, y):\n    return 2 * y\nmodel.register_forward_hook(hook)",
        "model = Net()\nmodel.register_forward_hook(hook).remove()\nmodel.register_forward_hook(hook)",
    ),
}


def _keys(cells, few, before: str, after: str) -> tuple[str, str]:
    try:
        first = store._key(cells(SETUP, before)["model"], few, RECIPE, {})
        return first, store._key(cells(after)["model"], few, RECIPE, {})
    finally:
        cells(RESTORE)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_student_changes_between_two_cells_makes_another_network(cells, few, change):
    first, second = _keys(cells, few, *CHANGES[change])
    assert first != second


@pytest.mark.parametrize("change", SAME)
def test_what_changes_nothing_finds_the_network(cells, few, change):
    first, second = _keys(cells, few, *SAME[change])
    assert first == second


@pytest.mark.parametrize(
    "addition", ["lock = threading.Lock()", "numbers = (i for i in range(3))", "shell = get_ipython()"]
)
def test_what_cannot_be_known_is_trained_and_not_kept(cells, few, tmp_path, addition):
    name = addition.split(" = ")[0]
    for _ in range(2):
        model = cells(SETUP, NET, f"import threading\n{addition}\nmodel.secret = lambda x: {name}\n")["model"]
        before = model.fc.weight.clone()
        with pytest.warns(UserWarning, match=f"not kept, as .*secret.*{name}"):
            Store(tmp_path).trained(model, few, RECIPE)
        assert not torch.equal(model.fc.weight, before)
    assert not list(tmp_path.iterdir())


def test_a_network_that_draws_unseeded_numbers_is_not_kept(cells, few, tmp_path):
    source = NET.replace("+ self.shift", "+ torch.rand(1, generator=generator)") + "generator.seed()\nmodel = Net()"
    model = cells(SETUP, "generator = torch.Generator()", source)["model"]
    with pytest.warns(UserWarning, match="answers differently each time"):
        Store(tmp_path).trained(model, few, RECIPE)


def test_a_network_that_changes_more_than_its_state_is_not_kept(cells, few, tmp_path):
    source = NET.replace("return y if", "self.power = self.power * 0.99\n        return y if")
    with pytest.warns(UserWarning, match="changed more of it than its state_dict"):
        Store(tmp_path).trained(cells(SETUP, source)["model"], few, RECIPE)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_pruned_network_is_kept_though_its_weight_is_computed_at_each_pass(few, tmp_path):
    for _ in range(2):
        model = mlp([784, 10, 10], seed=0)
        prune.l1_unstructured(model.fc1, "weight", amount=0.5)
        Store(tmp_path).trained(model, few, RECIPE)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_tied_weights_are_stored(few, tmp_path):
    def tied():
        model = mlp([784, 10, 10, 10], seed=0)
        model.fc3.weight = model.fc2.weight
        Store(tmp_path).trained(model, few, RECIPE)
        return model.fc3.weight

    assert torch.equal(tied(), tied())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_key_leaves_everything_as_it_is(cells, few):
    model = cells(SETUP, LAYERS)["model"].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].train()
    own = cells(NET, "model.forward = lambda x: model.fc(x)")["model"]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    before = copy.deepcopy(model.state_dict())
    assert store._key(model, few, RECIPE, {}) == store._key(model, few, RECIPE, {})
    store._key(own, few, RECIPE, {})
    assert own.fc.weight.grad is None, "though a copy of its forward uses the network itself"
    assert [layer.training for layer in model.modules()] == [False, False, True, False, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_the_key_is_of_the_code_that_trains_and_of_the_device(few, monkeypatch):
    model = mlp([784, 8, 10], seed=0)
    key = store._key(model, few, RECIPE, {})
    with monkeypatch.context() as patch:
        patch.setattr(training, "batches", lambda *given, **options: iter(()))
        assert store._key(model, few, RECIPE, {}) != key, "the order of the samples"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda self: None)
        assert store._key(model, few, RECIPE, {}) == key, "PyTorch's own code is its version's"
        patch.setattr(torch, "__version__", "0.0")
        assert store._key(model, few, RECIPE, {}) != key
    # As if from a GPU, where there is none.
    monkeypatch.setattr(store, "_first_answers", lambda *given: "")
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: "")
    here, there = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    keys = {store._key(model, replace(few, train_images=images), RECIPE, {}) for images in (here, there)}
    assert len(keys) == 2


def test_keys_are_the_same_in_another_process(few):
    says = """
        import torch
        from lowrank_helpers import data, layers, models
        from lowrank_helpers.series import store
        from lowrank_helpers.training import Recipe
        torch.set_num_threads(1)
        few = data.load("digits").select(train=torch.arange(100), test=torch.arange(100))
        factors = layers.factorize(models.mlp([784, 16, 10], seed=0), {"fc1": 8})
        several = [factors, models.convnet([4], 8, seed=0),
                   models.VisionTransformer(width=8, n_blocks=1, seed=0)]
        several[1].names = {"in", "any", "order"}
        keys = [store._key(network, few, Recipe(1, 64, 1e-3), {}) for network in several]
        print(*keys)
    """
    code = textwrap.dedent(says)
    here: dict = {}
    exec(code, here)
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.split() == here["keys"]


CODE = '''
def order(n):
    """Return the order."""
    # Any will do.
    return list(range(n))
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Return the order.", "Say in which order.", True),
        ('    """Return the order."""\n', "", True),
        ("# Any will do.", "# Not any.", True),
        ("range(n)", "range(n, 0, -1)", False),
        ("def order(n):", "def order(n, seed=0):", False),
    ],
)
def test_digest_of_cells_follows_what_code_does_and_not_what_it_says(old, new, same):
    assert old in CODE
    first, second = (digest.of_cells(["%matplotlib inline\nx = 1", code]) for code in (CODE, CODE.replace(old, new)))
    assert (first == second) is same


def test_digest_of_cells_tells_cells_and_magics_apart():
    cells = [["a = 1", "b = 2"], ["a = 1\nb = 2"], ["b = 2", "a = 1"], ["%time a = 1"], ["%time a = 2"], ["!ls"], []]
    assert len(set(map(digest.of_cells, cells))) == len(cells)


def recomputed(saved, few, folder: Path, content: bytes) -> None:
    """Expect a damaged file to be named in a warning, and the training done again with the same result."""
    file, weights, history = saved
    damaged = folder / file.name
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=re.escape(file.name)):
        again, retrained = train(folder, few)
    assert torch.equal(again, weights)
    assert (retrained.loss, retrained.accuracy) == (history.loss, history.accuracy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(folder, few)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_trained_again(saved, few, tmp_path, share):
    content = saved[0].read_bytes()
    recomputed(saved, few, tmp_path, content[: int(share * len(content))])


@given(place=st.integers(0, 999_999), bit=st.integers(0, 7), in_header=st.booleans())
def test_flipped_bit_is_noticed_wherever_it_is(saved, few, tmp_path_factory, place, bit, in_header):
    content = bytearray(saved[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[place * (header if in_header else len(content)) // 1_000_000] ^= 1 << bit
    recomputed(saved, few, tmp_path_factory.mktemp("flipped"), bytes(content))


def resealed(saved, folder: Path, **header: str) -> bytes:
    """Return the stored network under another header."""
    with safe_open(saved[0], framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        save_file(tensors, folder / "other", metadata=stored.metadata() | header)
    content = (folder / "other").read_bytes()
    (folder / "other").unlink()
    return content


@pytest.mark.parametrize("header", [{"format": "0"}, {"key": "0" * 32}, {"history": "{}"}, {"seal": ""}])
def test_other_format_key_history_or_seal_is_trained_again(saved, few, tmp_path, header):
    recomputed(saved, few, tmp_path, resealed(saved, tmp_path, **header))


def test_file_of_another_network_is_trained_again(saved, few, tmp_path):
    other = tmp_path / "elsewhere"
    train(other, few, seed=1)
    recomputed(saved, few, tmp_path, next(other.iterdir()).read_bytes())


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_malicious_pickle_is_refused(saved, few, tmp_path):
    trace, payload = tmp_path / "trace", tmp_path / "payload"
    torch.save(Malicious(trace), payload)
    recomputed(saved, few, tmp_path, payload.read_bytes())
    assert not trace.exists()
    torch.load(payload, weights_only=False)
    assert trace.exists(), "the payload must work, or the test proves nothing"


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
    for pause in (0.003, 0.011, 0.017, 0.023):
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
