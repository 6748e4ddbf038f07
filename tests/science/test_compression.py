"""Compressing any network: factors against NumPy and PyTorch, budgets kept, and models that need care."""

from functools import partial
from itertools import count, pairwise

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Network, Scaled, draw
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lowrank_helpers import calibration, compression
from lowrank_helpers.calibration import without_mean
from lowrank_helpers.compression import Change, Report, compress
from lowrank_helpers.data import Dataset
from lowrank_helpers.layers import factorize
from lowrank_helpers.models import convnet, mlp, n_parameters
from lowrank_helpers.timing import median_seconds
from lowrank_helpers.training import Recipe, evaluate, fit


def _function(function):
    return Network(lambda _, x: function(x))


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Time as little as can be: how long a network takes is nothing that these tests look at."""
    monkeypatch.setattr(compression, "median_seconds", partial(median_seconds, at_least=1e-4))


@pytest.fixture
def data():
    return draw(60, 784)


@pytest.fixture(scope="module")
def digits_held_out(digits):
    return digits.hold_out()


@pytest.fixture(scope="module")
def trained(digits_held_out):
    model = convnet([8, 12], 24, seed=0)
    fit(model, digits_held_out, Recipe(3, 64, 8e-3))
    return model


@pytest.mark.parametrize("budget", [0.3, np.float32(0.3), 6000, np.int64(6000)])
def test_a_budget_of_parameters_is_kept_and_used(trained, digits_held_out, budget):
    small, report = compress(trained, digits_held_out, budget)
    limit = budget * n_parameters(trained) if budget < 1 else budget
    assert 0.8 * limit < n_parameters(small) == report.parameters.after <= limit
    assert report.parameters.before == n_parameters(trained)


def test_a_budget_of_flops_is_kept_as_pytorch_counts_them(trained, digits_held_out):
    _, report = compress(trained, digits_held_out, 0.5, metric="flops")
    assert report.flops.before == 2 * (14**2 * 8 * 9 + 7**2 * 12 * 72 + 588 * 24 + 240)
    assert 0.4 < report.flops.share <= 0.5
    assert compress(trained, digits_held_out, report.parameters.share)[1].ranks != report.ranks


def test_the_frontier_is_what_other_budgets_would_measure(trained, digits_held_out):
    _, report = compress(trained, digits_held_out, 0.5, n_budgets=5)
    *_, (share, change), last = report.frontier.items()
    assert len(report.frontier) == 5 and last == (1, 0)
    _, other = compress(trained, digits_held_out, round(share * n_parameters(trained)))
    assert (other.parameters.share, other.measured_error) == pytest.approx((share, change))


@pytest.mark.parametrize(("kind", "kept"), [("accuracy", 0.98), ("loss", 1.2)])
def test_a_score_is_kept_and_less_would_not_do(trained, digits_held_out, kind, kept):
    validation = digits_held_out.splits()["validation"]

    def score(model):
        assert not model.training
        return getattr(evaluate(model, *validation), kind) * (-1 if kind == "loss" else 1)

    least = kept * score(trained.eval())
    small, report = compress(trained, digits_held_out, least, metric=score)
    assert report.score == pytest.approx((least / kept, score(small)), abs=1e-6) and score(small) >= least
    assert f"score: {report.score}" in str(report) and report.parameters.share < 0.8
    less, _ = compress(trained, digits_held_out, int(0.9 * report.parameters.after))
    assert score(less) < least


def test_a_latency_is_what_was_measured_and_the_largest_model_that_keeps_it(trained, digits_held_out, monkeypatch):
    monkeypatch.setattr(compression, "_seconds", lambda model, _: 1 + n_parameters(model) / n_parameters(trained))
    _, report = compress(trained, digits_held_out, 0.75, metric="latency")
    assert report.seconds.before == 2
    assert report.seconds.share == pytest.approx((1 + report.parameters.share) / 2)
    assert 0.68 < report.seconds.share <= 0.75
    with pytest.raises(ValueError, match=r"too small: rank 1 .* leaves latency 2 → 1\.\d+ \(5\d\.\d%\)"):
        compress(trained, digits_held_out, 0.4, metric="latency")


def test_large_images_go_through_a_model_few_at_a_time(digits_held_out, monkeypatch):
    sizes, model = [], mlp([784, 32, 10], seed=0)
    model.register_forward_hook(lambda layer, arguments, output: sizes.append(len(output)))
    for limit in (10**9, 20 * 784):
        monkeypatch.setattr(calibration, "LARGE_BATCH", limit)
        compress(model, digits_held_out, 0.5)
        assert max(sizes) == min(calibration.BATCH, limit // 784)
        sizes.clear()


def test_operations_and_time_are_of_the_models_given_and_returned(trained, digits_held_out, monkeypatch):
    timed = []
    monkeypatch.setattr(compression, "_seconds", lambda *timing: timed.append(timing) or len(timed))
    small, report = compress(trained, digits_held_out, 0.6)
    sizes = [(n_parameters(model), len(given.fitted[0])) for model, given in timed]
    assert sizes == [(n_parameters(trained), 64), (n_parameters(small), 64)]
    assert "flops: " in str(report) and "seconds: 1 → 2 (200.0%)" in str(report)


@pytest.mark.parametrize(
    ("seconds", "word"), [(0.5, "Faster"), (1.01, "Smaller, but no faster"), (1.2, "Slower: do not use it")]
)
def test_the_verdict_says_whether_it_was_worth_it(seconds, word):
    sizes = Change(100, 20)
    report = Report({}, {}, {}, 0.1, 0.123, sizes, sizes, Change(1.0, seconds))
    time = f"with 20% of the parameters it takes {seconds:.0%} of the time"
    assert str(report).splitlines()[0] == f"{word}; {time}, and its outputs change by 12.3% before tuning."


def _two_of_both(net, left, right):
    hidden = (net.left(left) + net.right(right)).relu()
    return {"hidden": hidden, "logits": net.head(hidden)}


def _logits(model, batch):
    return model(batch["left"], batch["right"])["logits"]


def _dictionaries(n_batches):
    for i in range(n_batches):
        yield {"left": draw(16, 40, seed=i), "right": draw(16, 20, seed=i + 100)}


def test_batches_of_any_kind_fit_a_model_of_any_kind():
    torch.manual_seed(0)
    model = Network(_two_of_both, left=nn.Linear(40, 30), right=nn.Linear(20, 30), head=nn.Linear(30, 10))
    read = list(_dictionaries(12))
    small, report = compress(model, _dictionaries(12), 0.5, forward=_logits)  # a generator: read once
    held_out = [read[0], read[6]]
    wanted, ours = (torch.cat([_logits(m, batch) for batch in held_out]) for m in (model, small))
    assert report.measured_error == pytest.approx(((ours - wanted).norm() / wanted.norm()).item(), rel=1e-4)
    assert report.flops.before == 2 * (40 * 30 + 20 * 30 + 30 * 10) and report.parameters.share <= 0.5
    read[0]["left"] = read[6]["left"] = torch.zeros(16, 40)
    changed, _ = compress(model, read, 0.5, forward=_logits)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), changed.parameters(), strict=True))


def test_a_loader_and_a_list_give_what_they_hold_and_no_more_is_read_than_is_used(data):
    model = mlp([784, 40, 10], seed=0)
    loader = DataLoader(TensorDataset(data, torch.zeros(60)), batch_size=6)
    by_loader = compress(model, loader, 0.5)[1]
    by_list = compress(model, list(data.split(6)), 0.5)[1]
    assert (by_loader.ranks, by_loader.measured_error) == (by_list.ranks, by_list.measured_error)
    endless = (torch.ones(500, 784) * i for i in count())
    compress(model, endless, 0.5)
    assert next(endless)[0, 0] == round(1.2 * calibration.CALIBRATION) // 500


def test_named_layers_and_those_of_a_pattern_stay_dense(data):
    model = mlp([784, 40, 40, 10], seed=0)
    small, report = compress(model, data, 0.97, ignore=["fc2", "*3"])
    assert report.ranks.keys() == {"fc1"} and torch.equal(small.fc2.weight, model.fc2.weight)
    assert report.left_alone == {"fc2": "ignored by 'fc2'", "fc3": "ignored by '*3'"}
    with pytest.raises(ValueError, match=r"'fc9', to be ignored, matches no layer; the layers are fc1, fc2, fc3"):
        compress(model, data, 0.5, ignore=["fc9"])


@pytest.mark.parametrize(
    ("budget", "options", "named"),
    [
        (0.001, {}, r"too small: rank 1 .* leaves parameters [\d,]+ → [\d,]+ \([\d.]+%\)"),
        (10, {"metric": "flops"}, "too small: rank 1"),
        (1.0, {"metric": lambda model: 0.5}, "a score of 1 is impossible: the model itself has 0.5"),
        (0.5, {"metric": lambda model: float("nan")}, "impossible: the model itself has nan"),
        (1.5, {}, "up to 1, or a whole number"),
        (0.0, {}, "above 0"),
        (float("nan"), {}, "above 0"),
        (50, {"metric": "latency"}, "up to 1$"),
        (0.5, {"metric": "accuracy"}, "parameters, flops, latency, or a function of a model"),
    ],
)
def test_an_impossible_budget_is_refused_with_what_is_possible(data, budget, options, named, monkeypatch):
    monkeypatch.setattr(compression, "_decomposed", None)  # before layers are measured
    with pytest.raises(ValueError, match=named):
        compress(mlp([784, 40, 10], seed=0), data, budget, **options)


def _steps(x):
    """Return steps in half of the numbers, whose derivative is next to nothing, and next to nothing in the others."""
    hard, easy = x.chunk(2, dim=1)
    return torch.cat([(3 * hard).round() + 1e-4 * hard, 1e-2 * easy], dim=1)


ACTIVATIONS = {
    "steps": _function(_steps),
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "round": _function(torch.round),
    "sign": _function(torch.sign),
    "detach": _function(torch.Tensor.detach),
    "without gradient": _function(torch.no_grad()(lambda x: x.clone())),
}


@st.composite
def _networks(draw):
    """A small network, of linear layers or convolutions, whose last layers may hold or hide next to nothing."""
    torch.manual_seed(draw(st.integers(0, 99)))
    widths = draw(st.lists(st.integers(4, 24), min_size=2, max_size=4))
    axes = draw(st.integers(0, 3))
    kind = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes]
    window = {"kernel_size": draw(st.sampled_from([1, 3])), "padding": "same"} if axes else {}
    layers = []
    for n, m in pairwise(widths):
        layers += [kind(n, m, **window), ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]]
    end = [nn.Flatten(), nn.Linear(widths[-1] * 3**axes, draw(st.integers(1, 12)))]
    nn.init.normal_(end[1].weight, std=draw(st.sampled_from([0.0, 1e-6, 1.0])))
    return nn.Sequential(*layers, *end), torch.randn(120, widths[0], *[3] * axes)


@pytest.mark.filterwarnings("ignore:the outputs change")
@settings(max_examples=25)
@given(_networks(), st.floats(0.4, 0.9), st.booleans())
def test_no_layer_is_lost_and_no_change_is_much_larger_than_that_of_the_plain_svd(network, budget, logits):
    model, x = network
    held_out, none = x[:20], torch.zeros(20)
    data = Dataset("drawn", x[20:], torch.zeros(100), held_out, none, held_out, none, mean=0.0, std=1.0)
    try:
        small, report = compress(model, data, budget, logits=logits)
    except ValueError as error:
        assert "too small" in str(error)
        return
    assert all(layer.B.weight.any() or layer.C.weight.any() for layer in map(small.get_submodule, report.ranks))
    plain = factorize(model, report.ranks)
    wanted, ours, theirs = (m(held_out).detach() for m in (model, small, plain))
    if logits:
        wanted, ours, theirs = map(without_mean, (wanted, ours, theirs))
    assert (ours - wanted).norm() <= 1.01 * max((theirs - wanted).norm(), 2 * max(report.error, 0.05) * wanted.norm())
    change = ((ours - wanted).norm() / wanted.norm()).nan_to_num().item()
    assert report.measured_error == pytest.approx(change, rel=1e-4)


def test_a_layer_may_be_called_without_a_batch(data):
    layers = {"condition": nn.Linear(32, 784), "out": nn.Linear(784, 10)}
    conditioned = Network(lambda net, x: net.out((x + net.condition(net.query)).relu()), **layers)
    conditioned.query = nn.Parameter(draw(32))
    _, report = compress(conditioned, data, 0.3)
    assert report.ranks["condition"] == 1 and report.measured_error < 0.5


def test_a_model_that_draws_from_pytorch_is_cut_and_one_that_draws_elsewhere_is_refused(data):
    dropout = _answers(lambda x: F.dropout(x, training=True))
    assert compress(dropout, data, 0.5)[1].ranks.keys() == {"fc"}
    with pytest.raises(ValueError, match="Network gives other outputs for the same inputs each time"):
        compress(_answers(lambda x: x * np.random.default_rng().random()), data, 0.5)


def test_where_outputs_change_far_more_than_predicted_layers_fall_back_by_name(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(60, 40), _function(_steps)), draw(600, 60) * torch.logspace(-1, 1, 60)
    _, report = compress(model, x, 0.5)
    monkeypatch.setattr(compression, "FAR", np.inf)
    _, before = compress(model, x, 0.5)
    assert before.measured_error > 2 * before.error and not before.fallbacks
    assert report.measured_error < 0.9 * before.measured_error
    assert f"0: rank {report.ranks['0']}, fitted to its own outputs" in str(report)
    assert f"predicted {report.error:.3g}, measured {report.measured_error:.3g} on inputs" in str(report)


def test_a_layer_that_cannot_be_cut_as_predicted_stays_dense_where_the_budget_allows(monkeypatch):
    def two_ways(net, x):
        hard = net.hard(x)
        return torch.cat([net.easy(x) * 1e-2, (1e3 * hard).sin().sign() + 1e-4 * hard], dim=1)

    torch.manual_seed(0)
    model = Network(two_ways, easy=nn.Linear(40, 80), hard=nn.Linear(40, 30))
    _, report = compress(model, draw(300, 40), 0.6)
    assert "with it cut, the outputs changed by" in report.left_alone["hard"]
    assert report.ranks.keys() == {"easy"} and report.measured_error < 0.01
    monkeypatch.setattr(compression, "_seconds", lambda model, _: n_parameters(model))
    for metric in ("parameters", "latency"):  # with "hard" dense a third is left at least
        _, report = compress(model, draw(300, 40), 0.2, metric=metric)
        assert "hard" in report.ranks and report.parameters.share <= 0.2


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda x: None, TypeError, "an iterable of batches such as a DataLoader; given: None"),
        (lambda x: (x, torch.zeros(60)), TypeError, r"a tensor of inputs, or .* given: \(tensor"),
        (lambda x: {"x": x}, TypeError, "an iterable of batches such as a DataLoader; given: {'x'"),
        (lambda x: TensorDataset(x), TypeError, "an iterable of batches .* given: <torch.*TensorDataset"),
        (lambda x: x[:1], ValueError, "at least two inputs are needed; given: 1$"),
        (lambda x: [x], ValueError, "at least two batches are needed, as one is held out; given: 1$"),
        (lambda x: [], ValueError, "at least two batches are needed, as one is held out; given: 0$"),
        (lambda x: [x.numpy()] * 2, ValueError, r"run on a ndarray \(TypeError: .*say how by forward="),
        (lambda x: [{"x": x}] * 2, ValueError, r"does not run on a dict \(.*say how by forward="),
        (lambda x: x * torch.nan, ValueError, "Sequential gave NaN or infinity; one finite tensor"),
    ],
)
def test_data_that_cannot_be_used_are_refused_with_what_can(change, error, named, data):
    with pytest.raises(error, match=named):
        compress(mlp([784, 40, 10], seed=0), change(data), 0.5)


def _answers(answer):
    return Network(lambda net, x: answer(net.fc(x)), fc=nn.Linear(784, 10))


def _compiled_in_place():
    model = mlp([784, 20, 10], seed=0)
    model.fc1.compile(backend="eager")
    return model


@torch.no_grad()
def _pruned():
    return nn.Sequential(prune.l1_unstructured(nn.Linear(784, 10), "weight", 0.5))


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: "resnet18", TypeError, "must be a torch.nn.Module, not str"),
        (lambda: nn.Sequential(nn.LazyLinear(9)), ValueError, r"0\.weight, 0\.bias: no values yet"),
        (lambda: nn.Linear(784, 9, device="meta"), ValueError, "weight, bias: no values yet"),
        (lambda: torch.compile(mlp([784, 20, 10], seed=0), backend="eager"), ValueError, "the model is compiled"),
        (_compiled_in_place, ValueError, "the model is compiled"),
        (lambda: nn.Linear(784, 9), ValueError, r"the model itself is the layer.*nn\.Sequential"),
        (lambda: _answers(lambda x: {"logits": x}), ValueError, "Network gave a dict; one finite tensor"),
        (lambda: _answers(lambda x: x.argmax(1)), ValueError, r"gave torch.int64 of shape \(50,\); one finite tensor"),
        (lambda: nn.Flatten(), ValueError, "Flatten has no layer that can be replaced"),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 784)), nn.ConvTranspose1d(1, 2, 3)), ValueError, "1': 'only plain"),
        (_pruned, ValueError, "0.weight_orig': 'only plain"),
    ],
)
def test_models_that_cannot_be_compressed_are_refused_with_what_to_do(make, error, named, data):
    with pytest.raises(error, match=named):
        compress(make(), data, 0.5)


def test_the_model_stays_as_it_was_and_the_copy_in_its_mode(data):
    model = nn.Sequential(nn.Linear(784, 30), nn.BatchNorm1d(30), nn.Dropout(), nn.Linear(30, 10)).double().train()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, report = compress(model, data.double(), 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in (*model.modules(), *small.modules()))
    assert report.ranks.keys() == {"0"} and {parameter.dtype for parameter in small.parameters()} == {torch.float64}


def _tied():
    model = nn.Sequential(nn.Linear(784, 30), nn.Linear(30, 30), nn.Linear(30, 30))
    model[1].weight = model[2].weight
    return model


def _reads_size():
    layers = {"plain": nn.Linear(784, 30), "read": nn.Linear(30, 30), "idle": nn.Linear(20, 20)}
    return Network(lambda net, x: net.read(net.plain(x)) + net.read.in_features, **layers)


def _convolutions():
    layers = nn.Conv2d(1, 16, 3, stride=2), nn.Conv2d(16, 16, 3, groups=4), nn.ConvTranspose2d(16, 8, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *layers, nn.Flatten(), nn.Linear(8 * 144, 10))


PLAIN = "only plain weights of nn.Linear, and of nn.Conv1d to 3d of one group, are replaced"
LEFT_ALONE = [
    (_tied, {"1": "shares its weight with 2", "2": "shares its weight with 1"}),
    (_reads_size, {"read": "no attribute 'in_features'", "idle": "never calls it"}),
    (lambda: nn.Sequential(nn.Linear(784, 30), Scaled(30, 30)), {"1": "something else than its weight"}),
    (
        lambda: nn.Sequential(nn.Linear(784, 30), nn.utils.parametrizations.spectral_norm(nn.Linear(30, 30))),
        {"1.parametrizations.weight.original": PLAIN},
    ),
    (_convolutions, {"2": PLAIN, "3": PLAIN}),
]


@pytest.mark.parametrize(("make", "reasons"), LEFT_ALONE)
def test_matrices_that_cannot_be_replaced_are_left_alone_by_name(make, reasons, data):
    torch.manual_seed(0)
    small, report = compress(make(), data, 0.97)
    assert report.left_alone.keys() == reasons.keys() and report.ranks
    for name, reason in reasons.items():
        assert reason in report.left_alone[name]
        assert f"{name}: left alone, {report.left_alone[name]}" in str(report)
    assert all(f"{name}: rank {rank}" in str(report) for name, rank in report.ranks.items())
    assert make is not _tied or small[1].weight is small[2].weight


def _encoder():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(28, 2, 64, batch_first=True), 2)
    return nn.Sequential(nn.Unflatten(1, (28, 28)), encoder, nn.Flatten(), nn.Linear(784, 10))


def test_pytorchs_transformer_is_compressed_and_its_attention_left_alone(data):
    model = _encoder().eval().requires_grad_(False)
    small, report = compress(model, data, 0.6)
    assert {"1.layers.0.linear1", "1.layers.1.linear2"} <= report.ranks.keys()
    assert "never calls it" in report.left_alone["1.layers.0.self_attn.out_proj"]
    assert report.left_alone["1.layers.0.self_attn.in_proj_weight"] == PLAIN
    assert report.flops.before == compress(_encoder().eval(), data, 0.6)[1].flops.before
    with torch.no_grad():  # where PyTorch would run fused code on the weights that are gone
        assert small(data).shape == (60, 10)
        mask = torch.zeros(60, 28, dtype=torch.bool)
        mask[:, 20:] = True
        assert small[1](data.view(60, 28, 28), src_key_padding_mask=mask).isfinite().all()


def test_onnx_computes_what_the_returned_model_does(data, tmp_path):
    small, report = compress(convnet([6, 8], 16, seed=0), data, 0.3, metric="flops")
    assert {type(small.get_submodule(name)[0]) for name in report.ranks} == {nn.Conv2d, nn.Linear}
    file = tmp_path / "small.onnx"
    torch.onnx.export(small.eval(), (data,), file, input_names=["images"], dynamo=True, verbose=False)
    onnx.checker.check_model(file)
    (answer,) = ReferenceEvaluator(str(file)).run(None, {"images": data.numpy()})
    np.testing.assert_allclose(answer, small(data).detach(), atol=1e-5, rtol=1e-4)
