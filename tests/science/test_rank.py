"""Measures of rank against closed forms, NumPy, SciPy and the published constants."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, optimize, stats
from torch import nn

from lowrank_helpers import rank
from lowrank_helpers.layers import factorize
from lowrank_helpers.models import mlp

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8)
ENTRIES = st.floats(-100, 100, width=32, allow_subnormal=False)  # training flushes them to zero
MATRICES = hnp.arrays(np.float64, SHAPES, elements=ENTRIES)
COMPLEX = hnp.arrays(np.complex128, SHAPES, elements=st.complex_numbers(max_magnitude=100, allow_subnormal=False))
SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(lambda s: np.sort(s)[::-1])


def _random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _all_measures(matrix):
    return rank.rank_table({"it": torch.from_numpy(matrix)}).loc["it", list(rank.MEASURES)].astype(float)


@given(st.one_of(MATRICES, COMPLEX))
def test_singular_values_are_numpys(matrix):
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(rank.singular_values(matrix), expected, atol=1e-9 * max(1, expected[0]))


def test_singular_values_of_a_trainable_weight_in_any_type():
    layer = nn.Linear(5, 3)
    exact = rank.singular_values(layer.weight)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(rank.singular_values(layer.weight.bfloat16()), exact, rtol=0.02)
    array = layer.weight.detach().numpy()
    array.flags.writeable = False
    for view in (array, array[::-1], array.T, array.tolist()):
        np.testing.assert_allclose(rank.singular_values(view), exact, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5000, 40), (40, 5000), (1100, 300), (2500, 1)])
@pytest.mark.parametrize("phase", [0, 1j])
def test_tall_and_wide_matrices_are_decomposed_block_by_block(shape, phase):
    matrix = _random(shape) * np.geomspace(1, 1e-12, shape[1]) * np.exp(phase * _random(shape, seed=1))
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(rank.singular_values(matrix), expected, rtol=1e-10, atol=1e-14 * expected[0])


@pytest.mark.parametrize(
    ("measure", "numbers", "error", "named"),
    [
        *((rank.singular_values, np.zeros(shape), ValueError, None) for shape in (3, (2, 2, 2), (0, 3))),
        *((rank.singular_values, numbers, ValueError, None) for numbers in ([[1.0, np.nan]], [[np.inf, 1.0]])),
        *((rank.singular_values, x, TypeError, None) for x in ("a matrix", None, nn.Linear(2, 2), {"fc": np.eye(2)})),
        *((rank.rank_table, x, TypeError, "matrices by name") for x in (np.eye(2), nn.Linear(2, 2), [np.eye(2)])),
        (partial(rank.energy_rank, np.ones(3)), 90, ValueError, "share 90"),
    ],
)
def test_what_is_no_finite_matrix_no_matrices_by_name_or_no_share_is_refused(measure, numbers, error, named):
    with pytest.raises(error, match=named):
        measure(numbers)


OF_SPECTRA = {
    "numerical": lambda s: rank.numerical_rank(s, 0.1),
    "rounding": lambda s: rank.tolerance(s, (3, 4), torch.float16),
    "stable": rank.stable_rank,
    "effective": rank.effective_rank,
    "energy": lambda s: rank.energy_rank(s, 0.9),
    "hard threshold": lambda s: rank.gavish_donoho_threshold(s, (3, 4)),
}


@pytest.mark.parametrize("measure", OF_SPECTRA.values(), ids=OF_SPECTRA)
def test_measures_take_tensors_and_arrays_and_refuse_what_are_no_singular_values(measure):
    s = [3.0, 2.0, 1.0]
    assert measure(np.array(s)) == measure(torch.tensor(s, requires_grad=True)) == measure(s)
    for matrix in (np.eye(3), torch.eye(3), np.zeros(0), 1.0):
        with pytest.raises(ValueError, match="a vector, not an array of shape"):
            measure(matrix)
    for impossible in ([1.0, 2.0], [1.0, -1.0], [-1.0], [np.nan], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="the largest first"):
            measure(impossible)
    with pytest.raises(TypeError):
        measure("much")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, 3), (torch.complex128, 3), (torch.float32, 2), (torch.float16, 1), (torch.int64, 1)],
)
def test_the_numerical_rank_goes_by_the_type_that_the_matrix_is_stored_in(dtype, expected):
    matrix = torch.diag(torch.tensor([1, 1e-5, 1e-10], dtype=torch.float64)).to(dtype)
    assert rank.rank_table({"it": matrix}).loc["it", "numerical rank"] == expected
    if dtype != torch.float16:
        assert rank.rank_table({"it": matrix.numpy()}).loc["it", "numerical rank"] == expected


@given(n=st.integers(1, 8), m=st.integers(1, 8), k=st.integers(0, 8))
def test_numerical_rank_is_numpys(n, m, k):
    matrix = _random((n, k)) @ _random((k, m), seed=1)
    s = rank.singular_values(matrix)
    tolerance = rank.tolerance(s, (n, m), torch.float64)
    assert tolerance == max(n, m) * np.finfo(np.float64).eps
    assert rank.numerical_rank(s, tolerance) == np.linalg.matrix_rank(matrix) == min(n, m, k)


@given(seed=st.integers(0, 999), k=st.integers(1, 5), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_rounding_moves_no_singular_value_past_its_tolerance(seed, k, dtype):
    matrix = torch.from_numpy(_random((60, k), seed) @ _random((k, 30), seed + 1))
    rounded = rank.singular_values(matrix.to(dtype))
    tolerance = rank.tolerance(rank.singular_values(matrix), (60, 30), dtype)
    assert abs(rounded - rank.singular_values(matrix)).max() <= tolerance * rank.singular_values(matrix)[0]
    assert tolerance == pytest.approx(torch.finfo(dtype).eps / 2 * matrix.norm() / torch.linalg.matrix_norm(matrix, 2))
    assert rank.numerical_rank(rounded, rank.tolerance(rounded, (60, 30), dtype)) <= k


def test_measures_of_known_spectra():
    s = np.array([4.0, 2.0, 2.0, 0.0])
    assert rank.stable_rank(s) == 24 / 16
    assert rank.effective_rank(s) == pytest.approx(2 * 2**0.5)  # entropy of ½, ¼, ¼ is 1.5 bits
    assert [rank.energy_rank(s, share) for share in (0.5, 16 / 24, 0.67, 0.84, 1.0)] == [1, 1, 2, 3, 3]
    assert [rank.numerical_rank(s, tolerance) for tolerance in (0.0, 0.4, 0.5, 1.0)] == [3, 3, 1, 0]


@given(SPECTRA, st.floats(0.01, 1.0))
def test_energy_rank_is_the_first_that_suffices(s, share):
    r = rank.energy_rank(s, share)
    energy = s**2 / (s**2).sum()
    assert energy[:r].sum() >= share - 1e-9
    assert energy[: r - 1].sum() < share


@given(SPECTRA)
def test_effective_rank_is_scipys_entropy_and_stable_rank_the_least_of_measures(s):
    assert rank.effective_rank(s) == pytest.approx(np.exp(stats.entropy(s)))
    # Rényi entropies fall with their order: ∞ of σ² bounds stable rank, and 1 of σ is above 2 of σ.
    assert 1 <= rank.stable_rank(s) <= len(s) * (1 + 1e-12)
    participation = s.sum() ** 2 / (s**2).sum()
    assert rank.stable_rank(s) <= participation * (1 + 1e-9)
    assert participation <= rank.effective_rank(s) * (1 + 1e-9)
    assert rank.effective_rank(s) <= len(s) * (1 + 1e-9)


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-150, 1e-20, 1e-3, 1e3, 1e150]))
def test_measures_do_not_depend_on_scale_rotation_or_transposition(seed, scale):
    matrix = _random((9, 4), seed) * np.array([1, 0.5, 0.1, 0.01])
    rotation = np.linalg.qr(_random((9, 9), seed + 1))[0]
    for other in (scale * matrix, rotation @ matrix, matrix.T.copy()):
        np.testing.assert_allclose(_all_measures(other), _all_measures(matrix), rtol=1e-9)


def test_zero_and_extreme_spectra_have_finite_ranks():
    for shape in ((1, 1), (1, 5), (3, 2)):
        assert (_all_measures(np.zeros(shape)) == 0).all()
    for s in (np.array([1e300, 1e-300]), np.array([1e-300, 1e-300])):
        for name, measure in rank.MEASURES.items():
            assert np.isfinite(measure(s, (2, 2), torch.float64)), name


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_the_hard_threshold_is_the_published_one(beta):
    shape = (round(1000 * beta), 1000)
    optimal = (2 * (beta + 1) + 8 * beta / (beta + 1 + (beta**2 + 14 * beta + 1) ** 0.5)) ** 0.5
    edges = rank.marchenko_pastur_edges(shape, 1.0)

    def below(x):
        return integrate.quad(rank.marchenko_pastur_density, edges[0], x, args=(shape, 1.0))[0]

    median = optimize.brentq(lambda x: below(x) - 0.5, *edges) / 1000**0.5
    exact = optimal / median
    if beta == 1:
        assert exact == pytest.approx(2.858, abs=1e-3)  # table IV of the paper
    spectrum = np.array([3.0, 1.0, 0.5])  # with median 1
    assert rank.gavish_donoho_threshold(spectrum, shape) == pytest.approx(exact, abs=0.02)
    table = rank.rank_table({"it": np.diag([3.0, *[1.0] * 5])})
    assert table.loc["it", "Gavish–Donoho rank"] == 1, "3 is above 2.86 times the median"


@pytest.mark.parametrize("shape", [(300, 300), (200, 700), (700, 200)])
def test_the_marchenko_pastur_law_is_that_of_a_random_matrix(shape):
    std = 0.3
    lower, upper = rank.marchenko_pastur_edges(shape, std)
    s = rank.singular_values(std * _random(shape))
    assert lower - 0.05 * upper < s[-1] and s[0] < 1.02 * upper
    total = integrate.quad(rank.marchenko_pastur_density, lower, upper, args=(shape, std))[0]
    assert total == pytest.approx(1, abs=1e-6)
    grid = np.linspace(lower, upper, 4001)
    density = rank.marchenko_pastur_density(torch.from_numpy(grid), shape, std)
    distribution = np.cumsum(density) * (grid[1] - grid[0])
    distance = stats.kstest(s, lambda x: np.interp(x, grid, distribution)).statistic
    assert distance < 0.02  # eigenvalues repel each other: far nearer than independent draws
    outside = np.array([0.5 * lower, 1.01 * upper]) if lower else np.array([1.01 * upper])
    assert (rank.marchenko_pastur_density(outside, shape, std) == 0).all()


def test_the_table_has_every_layer_dense_or_factorised():
    model = mlp([784, 20, 15, 10], seed=0)
    table = rank.rank_table(rank.weight_matrices(factorize(model, {"fc2": 4})))
    assert list(table.index) == ["fc1", "fc2", "fc3"] and table.index.name == "layer"
    assert list(table) == [
        *("rows", "columns", "numerical rank", "effective rank", "stable rank"),
        *("energy rank 90 %", "energy rank 95 %", "energy rank 99 %", "Gavish–Donoho rank"),
    ]
    assert list(table["rows"]) == [20, 15, 10] and list(table["columns"]) == [784, 20, 15]
    assert list(table["numerical rank"]) == [20, 4, 10]
    assert table["numerical rank"].dtype == np.int64
    s = np.linalg.svd(model.fc1.weight.detach().numpy(), compute_uv=False)
    assert table.loc["fc1", "stable rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5)
