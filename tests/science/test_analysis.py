"""Networks and files that are not ours: what is measured, what is not and why, and that no code of a file runs."""

import json
import os
import pickle
import sys
from argparse import Namespace
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from networks import Network, draw
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_helpers.analysis import BEYOND, AnalysisError, analyze
from lowrank_helpers.layers import factorize
from lowrank_helpers.lora import adapt, save_adapter
from lowrank_helpers.models import LanguageModel, mlp
from lowrank_helpers.rank import effective_rank, singular_values


def _of_rank(k, shape=(40, 30), seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return torch.from_numpy(draw((shape[0], k)) @ draw((k, shape[1])))


def _stable_rank(matrix):
    s = np.linalg.svd(matrix.detach().numpy(), compute_uv=False)
    return (s**2).sum() / s[0] ** 2


def _written(folder, tensors, name="net.safetensors"):
    file = folder / name
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return str(file)


@pytest.fixture
def analyzed(monkeypatch):
    """Return a function that analyses a model as what a module holds."""

    def analyzed(model):
        monkeypatch.setitem(sys.modules, "stranger", SimpleNamespace(model=model))
        return analyze("stranger:model")

    return analyzed


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "net.pth", "net.bin", "net.ckpt", "net.pth.tar"])
def test_ranks_of_a_file_are_numpys(tmp_path, name):
    tensors = {
        "b.10.weight": _of_rank(3).float(),
        "b.9.weight": _of_rank(7, (20, 50)),
        "c.weight": draw(6, 4, 3, 3),
        "ones": torch.ones(30, 40),
        "zero": torch.zeros(5, 6),
    }
    table = analyze(_written(tmp_path, tensors, name)).table
    # Safetensors are sorted by name; layer 9 comes before layer 10 nevertheless.
    order = ["b.9", "b.10"] if name == "net.safetensors" else ["b.10", "b.9"]
    assert list(table.index) == [*order, "c", "ones", "zero"]
    for key, tensor in tensors.items():
        matrix = tensor.flatten(1).numpy()
        row = table.loc[key.removesuffix(".weight")]
        s = np.linalg.svd(matrix.astype(float), compute_uv=False)
        assert row["numerical rank"] == np.linalg.matrix_rank(matrix)
        assert (row["rows"], row["columns"]) == matrix.shape
        assert row["dtype"] == str(matrix.dtype)
        assert row["stable rank"] == pytest.approx((s**2).sum() / s[0] ** 2 if s[0] else 0)
        n, m = matrix.shape
        edge = matrix.astype(float).std() * (n**0.5 + m**0.5)
        assert row[BEYOND] == (s > max(edge, 1e-6)).sum()
    assert list(table["unfolded"][["b.9", "c"]]) == ["20×50", "6×4·3·3"]
    assert table.loc["zero", "remark"] == "all entries are zero"


def test_savings_are_counted_at_the_effective_rank_and_never_below_zero(tmp_path):
    orthogonal = torch.linalg.qr(draw(40, 40, seed=1).double()).Q
    found = analyze(_written(tmp_path, {"thin": orthogonal[:, :5] @ orthogonal[:5], "full": orthogonal.contiguous()}))
    # Five equal singular values are an effective rank of 5, of factors with 5·(40 + 40) numbers.
    assert dict(found.table["saved"]) == {"full": 0, "thin": 1600 - 400}
    assert (found.n_saved, found.n_parameters) == (1200, 3200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_rank_that_was_rounded(tmp_path, dtype):
    shape = (300, 200)  # where NumPy's tolerance for bfloat16 is above 1
    tensors = {"k5": _of_rank(5, shape).to(dtype), "full": torch.eye(200, dtype=dtype)}
    table = analyze(_written(tmp_path, tensors)).table
    assert dict(table["numerical rank"]) == {"full": 200, "k5": 5}
    assert set(table["dtype"]) == {str(dtype).removeprefix("torch.")}


NORM, MOMENT = "as a normalisation's", "an optimiser's state, no weight"
NO_MATRICES = {  # a part of what is said of each tensor; where it is said twice, after a mark
    "a vector": torch.ones(3),
    "a vector#": torch.ones(1, 1, 8),
    "a vector##": torch.ones(1, 8),
    "or a number": torch.tensor(2.0),
    "shape (0, 5)": torch.ones(0, 5),
    "int64": torch.ones(3, 3, dtype=torch.int64),
    "complex64": torch.ones(3, 3, dtype=torch.complex64),
    "float8_e4m3fn": torch.ones(3, 3).to(torch.float8_e4m3fn),
    "qint8": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "NaN or infinite": torch.tensor([[1.0, torch.nan], [0, 1]]),
    "must be finite": torch.full((3, 3), 1e308, dtype=torch.float64),
    "could not be measured": torch.eye(3).to_sparse(),
    "could not be measured#": torch.ones(3, 3, device="meta"),
    "a mask": torch.tril(torch.ones(1, 1, 8, 8)),
    "a mask#": torch.triu(torch.full((8, 8), -torch.inf), 1),
    "a mask##": torch.tril(torch.ones(1, 1, 8, 8)) - torch.tril(torch.ones(8, 8), -3),
}
NO_MASKS = {
    "identity": torch.eye(8),
    "triangle": torch.tril(torch.ones(8, 8)) + torch.eye(8),
    "binary": torch.ones(8, 8) - 2 * torch.eye(8).flip(0),
    "any": torch.randn(1, 1, 8, 8),
}
FILES = {  # what a file holds: the shape of each matrix that is measured, and why others are not
    "no matrices": (
        NO_MATRICES | {"fc": torch.eye(2)},
        {"fc": "2×2"},
        {said: said.rstrip("#") for said in NO_MATRICES},
    ),
    "no masks": (NO_MASKS, dict.fromkeys(NO_MASKS, "8×8"), {}),
    "moments without PyTorch's mapping": (
        {
            "opt": {"exp_avg": {"0": torch.eye(3)}},
            "state.0.momentum_buffer": torch.eye(3),
            "optimal_head": {"optim.weight": torch.eye(4)},
        },
        {"optimal_head.optim": "4×4"},
        dict.fromkeys(["opt.exp_avg.0", "state.0.momentum_buffer"], MOMENT),
    ),
    "names that are alike": (
        {"fc": torch.eye(2), "fc.weight": torch.eye(3), "a": {"b": torch.eye(4)}, "a.b": torch.eye(5)},
        {"fc": "2×2", "fc′": "3×3", "a.b": "4×4", "a.b′": "5×5"},
        {},
    ),
    "a name that commands the terminal": ({"\x1b[2J\nx": torch.eye(2)}, {"�[2J�x": "2×2"}, {}),
    "parts that do not fit": (
        {"a.weight_v": torch.randn(4, 3), "a.weight_g": torch.randn(4, 4), "c.weight_orig": torch.randn(4, 4)}
        | {f"b.{factor}.weight": torch.randn(4, 3) for factor in "BC"},
        {"a.weight_v": "4×3", "a.weight_g": "4×4", "c.weight_orig": "4×4", "b.B": "4×3", "b.C": "4×3"},
        {},
    ),
    "normalisations": (
        {f"norm{n}.{name}": torch.randn(n, 264) for n in (1, 6) for name in ("weight", "bias")}
        | {"head.weight": torch.randn(2, 8), "head.bias": torch.randn(2)},
        {"head": "2×8"},
        {"norm1.weight": "a vector", "norm1.bias": "a vector", "norm6.weight": NORM}
        | {"norm6.bias": "a bias", "head.bias": "a vector"},
    ),
}


@pytest.mark.parametrize("holds", FILES)
def test_what_a_file_holds_is_measured_or_skipped_with_its_reason(tmp_path, holds):
    tensors, shapes, reasons = FILES[holds]
    found = analyze(_written(tmp_path, tensors, "net.pt"))
    assert dict(found.table["unfolded"]) == shapes
    assert found.skipped.keys() == reasons.keys()
    for name, part in reasons.items():
        assert part in found.skipped[name], name


def test_a_product_and_a_stack_are_measured_as_such(tmp_path):
    adapter = {"fc.lora_A.weight": torch.randn(4, 32), "fc.lora_B.weight": torch.randn(48, 4)}  # PEFT's
    stacks = {"mlp.weight": torch.randn(3, 16, 8), "mlp.bias": torch.randn(3, 16), "position": torch.randn(1, 1, 9, 8)}
    found = analyze(_written(tmp_path, adapter | stacks, "net.pt"))
    shapes = {"fc.lora": "48×32", **{f"mlp.{i}": "16×8" for i in range(3)}, "position": "9×8"}
    assert dict(found.table["unfolded"]) == shapes
    assert found.skipped == {"fc.lora_A.weight": "a part of fc.lora", "mlp.bias": "a bias, by its name"}
    assert found.table.loc["fc.lora", ["numerical rank", "parameters"]].tolist() == [4, 320]
    assert found.table.loc["mlp.2", ["parameters", "remark"]].tolist() == [128, "of a stack of 3"]


@pytest.mark.parametrize("place", ["last_optimizer_state", "g_optim", "a.b"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.Rprop])
def test_an_optimisers_state_is_left_out_wherever_it_lies(tmp_path, make, place):
    model = mlp([8, 6, 4], seed=0)
    optimiser = make(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimiser.step()
    saved = {"model": model.state_dict(), place: [optimiser.state_dict()], "epoch": 3, "old": [torch.eye(2)]}
    found = analyze(_written(tmp_path, saved, "checkpoint.pt"))
    assert list(found.table.index) == ["model.fc1", "model.fc2", "old.0"]
    assert {name.partition(".")[0] for name in found.skipped} == {place.partition(".")[0]}
    assert set(found.skipped.values()) == {MOMENT}


def test_tied_tensors_are_measured_once(tmp_path, analyzed):
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    for found in (analyze(_written(tmp_path, model.state_dict(), "tied.pt")), analyzed(model)):
        assert list(found.table.index) == ["embedding"]
        assert found.skipped == {"head.weight": "the same tensor as embedding.weight"}


class _OwnFactors(nn.Module):
    """A stranger's layer of factors."""

    def __init__(self, norm=nn.Identity()):  # noqa: B008
        super().__init__()
        self.down, self.up = nn.Linear(12, 3, bias=False), nn.Linear(3, 10)
        norm(self.down)

    @property
    def weight(self):
        return self.up.weight @ self.down.weight

    def forward(self, x):
        return self.up(self.down(x))


def _pruned(layer, *names):
    for name in names:
        prune.random_unstructured(layer, name, 0.5)
    with torch.no_grad():  # what prune has computed at first is out of date from here on
        getattr(layer, f"{names[0]}_orig").mul_(torch.arange(1.0, 1 + getattr(layer, names[0]).shape[-1]))
    return layer


def _normed(norm, layer, **options):
    normed = norm(layer, **options)
    for parameter in normed.parameters():
        nn.init.normal_(parameter)
    return normed


COMPUTED = {  # a layer; the numbers in its weight's parts, or None where a file does not tell what the layer computes
    "factors": (lambda: factorize(mlp([30, 20], seed=0), {"fc1": 4}).fc1, 4 * (20 + 30)),
    "lora": (lambda: adapt(mlp([30, 20], seed=0), {"fc1": 4}, alpha=2, seed=0).fc1, None),
    "own": (_OwnFactors, None),
    "own, of a normed one": (lambda: _OwnFactors(parametrizations.weight_norm), None),
    "pruned": (lambda: _pruned(nn.Linear(6, 5), "weight", "bias"), 30),
    "pruned convolution": (lambda: _pruned(nn.Conv1d(4, 5, 3), "weight"), 60),
    "weight_norm": (lambda: _normed(parametrizations.weight_norm, nn.Linear(6, 5)), 35),
    "old weight_norm": (lambda: _normed(nn.utils.weight_norm, nn.Conv1d(4, 5, 3)), 65),
    "weight_norm of columns": (lambda: _normed(parametrizations.weight_norm, nn.Conv1d(4, 5, 3), dim=1), 64),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_a_layer_computes_is_measured_once_and_in_place_of_its_parts(tmp_path, kind, analyzed):
    make, n_stored = COMPUTED[kind]
    model = nn.Sequential(make(), nn.Linear(20, 2))
    model.register_module("alias", model[1])
    found = analyzed(model)
    assert list(found.table.index) == ["0", "1"] and model[0].training
    assert found.skipped["alias.weight"] == "the same tensor as 1.weight"
    layer, inputs = model[0].eval(), torch.eye(model[0].weight.shape[1])
    layer(inputs)  # prune and the old weight_norm compute the weight here
    if len(layer.weight.shape) == 2:  # a layer's own pass says what it applies
        applied = (layer(inputs) - layer(torch.zeros_like(inputs))).T.detach()
        assert found.table.loc["0", "stable rank"] == pytest.approx(_stable_rank(applied), rel=1e-4)
    if n_stored:
        of_file = analyze(_written(tmp_path, model.state_dict(), "net.pt"))
        assert list(of_file.table.index) == ["0", "1"]
        for table in (found.table, of_file.table):
            assert table.loc["0", "stable rank"] == pytest.approx(_stable_rank(model[0].weight.flatten(1)), rel=1e-4)
            assert table.loc["0", "parameters"] == n_stored


def test_a_weight_that_a_model_only_hands_on_does_not_hide_its_layers(analyzed):
    class Tied(Network):
        weight = property(lambda net: net.embedding.weight)

    tied = Tied(None, embedding=nn.Embedding(9, 4), fc=nn.Linear(4, 4))
    assert list(analyzed(tied).table.index) == ["embedding", "fc"]


def test_a_models_layers_tell_what_its_file_does_not(analyzed):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 4, 8))  # more experts than rows
            self.register_buffer("codes", torch.randn(4, 4))

    layers = {
        **{"experts": Experts(), "conv": nn.Conv1d(64, 4, 9, bias=False), "both": nn.Bilinear(4, 5, 3)},
        **{"up": nn.ConvTranspose2d(6, 4, 3, groups=2), "gru": nn.GRU(5, 3), "rms": nn.RMSNorm([6, 8])},
    }
    found = analyzed(nn.ModuleDict(layers))
    gates = [f"gru.weight_{part}_l0.{gate}" for part in ("ih", "hh") for gate in "rzn"]
    assert list(found.table.index) == [*(f"experts.{i}" for i in range(32)), "conv", "both", "up", *gates]
    assert found.table.loc["up", "remark"] == "transposed, 2 groups, below each other"
    assert found.skipped["experts.codes"] == "a buffer, no parameter"
    assert NORM in found.skipped["rms.weight"]


class _Command:
    """Pickled, it is a call of ``os.system`` or of ``exec``."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def test_no_code_of_a_file_is_executed(tmp_path):
    trace = tmp_path / "executed"
    content = {"weight": torch.eye(3), "it": _Command(os.system, f"touch {trace}")}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in range(6):
        (tmp_path / f"raw{protocol}.pt").write_bytes(pickle.dumps(content, protocol))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(content))
    files = sorted(tmp_path.glob("*.*"))
    assert len(files) == 9
    for file in files:
        with pytest.raises(AnalysisError, match=file.name) as refused:
            analyze(str(file))
        assert "\n" not in str(refused.value)
    with pytest.raises(AnalysisError, match=r"posix\.system"):
        analyze(str(tmp_path / "zip.pt"))
    assert not trace.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert trace.exists()  # the file is as malicious as it is meant to be


class _Settings(dict):
    """Such as the hyperparameters of a checkpoint."""


def test_a_whole_model_and_what_checkpoints_hold_beside_tensors_is_read_without_its_code(tmp_path, monkeypatch):
    model = LanguageModel(10, width=8, n_blocks=1, n_heads=2, seed=0)
    model.extra = [Namespace(a=1), tmp_path, np.float64(3), np.int64(3), np.eye(3), _Settings(a=2)]
    model.extra[0].owner = model.extra  # objects that hold each other
    model.extra += [defaultdict(list, a=[3]), _Command(exec, f"open({str(tmp_path / 'executed')!r}, 'w')")]
    of_model = analyze(_written(tmp_path, model.state_dict(), "state.pt"))
    monkeypatch.setattr(_Settings, "__setstate__", lambda *_: pytest.fail("its code ran"), raising=False)
    whole = analyze(_written(tmp_path, {"net": model, "best": np.float32(0.9)}, "whole.ckpt"))
    assert list(whole.table.index) == [f"net.{name}" for name in of_model.table.index]
    pd.testing.assert_frame_equal(whole.table.reset_index(drop=True), of_model.table.reset_index(drop=True))
    assert not (tmp_path / "executed").exists()


def test_the_folder_of_an_adapter_is_read_as_its_update(tmp_path):
    model = adapt(mlp([30, 20, 10], seed=0), {"fc1": 4}, alpha=2, seed=0)
    nn.init.normal_(model.fc1.lora_B)
    save_adapter(model, tmp_path)
    row = analyze(str(tmp_path)).table.loc["base_model.model.fc1.lora"]
    update = model.fc1.weight - model.fc1.base.weight
    assert row["effective rank"] == pytest.approx(effective_rank(singular_values(update)), rel=1e-4)
    assert (row["numerical rank"], row["parameters"]) == (4, 4 * (30 + 20))


def test_the_files_of_one_network_are_read_by_their_index(tmp_path):
    parts = {"1.safetensors": {"a": torch.eye(3)}, "2.safetensors": {"b": torch.ones(4, 3)}}
    index = {"weight_map": {name: part for part, tensors in parts.items() for name in tensors}}
    for part, tensors in parts.items():
        _written(tmp_path, tensors, part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert list(analyze(str(source)).table.index) == ["a", "b"]
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(AnalysisError, match=r"2\.safetensors"):
        analyze(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_program_is_refused(tmp_path):
    torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)).save(tmp_path / "program.pt")
    with pytest.raises(AnalysisError, match="torchscript"):
        analyze(str(tmp_path / "program.pt"))


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "legacy.pt"])
def test_truncated_and_altered_files_are_refused(tmp_path, name):
    file, tensor = tmp_path / name, torch.full((50, 50), 7.0)
    if name == "legacy.pt":
        torch.save({"weight": tensor}, file, _use_new_zipfile_serialization=False)
    else:
        _written(tmp_path, {"weight": tensor}, name)
    whole = file.read_bytes()
    damaged = [*(whole[:length] for length in (0, 1, 100, len(whole) // 2, len(whole) - 1)), b"just words"]
    if name == "net.pt":  # whose checksums tell a flipped bit; the others have none
        place = whole.index(tensor.numpy().tobytes()[:100])
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(AnalysisError, match=name) as refused:
            analyze(str(file))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.pt", "no file"),
        (".", "a folder"),
        (__file__, r"of no known format; give a file \(\.safetensors, \.pt, \.pth, \.bin, \.ckpt, \.tar, \.json\)"),
        ("nowhere:build", "ModuleNotFoundError"),
        ("torchvision.models:resnet", "resnet"),
        ("os:getcwd", "gives str"),
        ("torch.nn:Linear", "TypeError"),
        ("sys:exit", "SystemExit"),
        ("torch.nn:ReLU", "no matrix"),
    ],
)
def test_what_cannot_be_analysed_is_refused_by_name(source, said):
    with pytest.raises(AnalysisError, match=said) as refused:
        analyze(source)
    assert source in str(refused.value)
