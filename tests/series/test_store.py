"""What is stored must come back as it was saved, or be recognised as damaged: never as something else."""

import importlib
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowrank_helpers.data import PROJECT, Dataset
from lowrank_helpers.models import mlp
from lowrank_helpers.series import results, store
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
        ("# Any will do.", "# Not any.", True),
        ("range(n)", "range(n, 0, -1)", False),
        ("def order(n):", "def order(n, seed=0):", False),
    ],
)
def test_the_key_follows_what_code_does_and_not_what_it_says(old, new, same, tmp_path, monkeypatch):
    def key_part(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return store._source(importlib.import_module(name))

    monkeypatch.syspath_prepend(tmp_path)
    changed = CODE.replace(old, new)
    assert changed != CODE
    token = f"code_{abs(hash((old, new)))}"
    assert (key_part(f"{token}_a", CODE) == key_part(f"{token}_b", changed)) is same


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


FINDINGS = {"notebook": "02_train", "parameters": {"seed": 0}, "environment": {}, "findings": {"2.1": {"x": 0.98}}}


def test_findings_come_back_as_filed(tmp_path):
    results.file_findings(tmp_path, FINDINGS)
    assert results.read_findings(tmp_path) == {"02_train": FINDINGS}


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.98", "0.99"), ('"format": 2', '"format": 0'), ("}", ""), ('"seed": 0', '"seed": 1'), ("{", "[")],
)
def test_altered_findings_are_left_out_with_a_warning(tmp_path, old, new):
    results.file_findings(tmp_path, FINDINGS)
    file = results.findings_file(tmp_path, "02_train")
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.warns(UserWarning, match=r"02_train\.json"):
        assert results.read_findings(tmp_path) == {}


def test_findings_under_another_notebooks_name_are_left_out(tmp_path):
    results.file_findings(tmp_path, FINDINGS)
    shutil.copy(results.findings_file(tmp_path, "02_train"), results.findings_file(tmp_path, "03_rank"))
    with pytest.warns(UserWarning, match=r"03_rank\.json"):
        assert set(results.read_findings(tmp_path)) == {"02_train"}


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
