"""The steps of alternating descent are the longest that never raise the loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers.factorization import alternating_gradient_descent, alternating_least_squares


@given(st.integers(0, 99), st.integers(1, 6), st.integers(2, 8), st.integers(2, 8))
def test_at_rank_one_each_step_solves_for_its_factor(seed, steps, n, m):
    # C·Cᵀ is then a number, and the gradient step of length 1 over it ends where the quadratic is least.
    A = torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    stepped = alternating_gradient_descent(A, 1, steps=steps, seed=seed)
    solved = alternating_least_squares(A, 1, sweeps=steps, seed=seed)
    np.testing.assert_allclose(stepped.errors[1:], solved.errors[1:], rtol=1e-6)
    torch.testing.assert_close(stepped.product, solved.product, rtol=1e-5, atol=1e-6)
    assert stepped.errors[0] == pytest.approx(solved.errors[0])
