from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.methods.quadratic import layer_error, row_losses
from compressor.methods.refit import refit
from tests.methods import reference
from tests.methods.reference import correlated


def shift_of(H: torch.Tensor) -> float:
    return 0.01 * float(H.diagonal().mean())


@pytest.mark.parametrize(("m", "n"), [(1, 3), (6, 40), (20, 100)])
def test_reaches_the_exact_least_squares_solution(m: int, n: int) -> None:
    W, H, _ = correlated(m, n)
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(1)) < 0.5
    got = refit(W, W * mask, mask, H, shift_of(H), iterations=300, tolerance=1e-6)
    exact = reference.least_squares(W, mask, reference.damped(H, 0.01))
    A = reference.damped(H, 0.01)
    assert not got[~mask].any()
    assert reference.quadratic(W, got, A) == pytest.approx(reference.quadratic(W, exact, A), rel=1e-4)


def test_the_ordinary_number_of_iterations_is_nearly_exact() -> None:
    W, H, _ = correlated(40, 200)
    mask = torch.rand(40, 200, generator=torch.Generator().manual_seed(1)) < 0.5
    A = reference.damped(H, 0.01)
    best = reference.quadratic(W, reference.least_squares(W, mask, A), A)
    assert reference.quadratic(W, refit(W, W * mask, mask, H, shift_of(H)), A) < 1.02 * best


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 10_000), st.integers(0, 40), st.integers(1, 60))
def test_never_worse_row_by_row(m: int, n: int, seed: int, iterations: int, tokens: int) -> None:
    W, H, _ = correlated(m, n, seed, tokens)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=g) < 0.5
    start = (W + 0.1 * torch.randn(m, n, generator=g)) * mask
    end = refit(W, start, mask, H, shift_of(H), iterations)
    assert not end[~mask].any()
    assert (row_losses(W - end, H) <= row_losses(W - start, H)).all()


def test_the_optimum_is_left_alone() -> None:
    W, H, _ = correlated(12, 60)
    mask = torch.rand(12, 60, generator=torch.Generator().manual_seed(1)) < 0.5
    best = refit(W, W * mask, mask, H, shift_of(H), 300, 1e-7)
    again = refit(W, best, mask, H, shift_of(H))
    assert layer_error(W, again, H)[0] <= layer_error(W, best, H)[0]


def test_everything_kept_or_nothing() -> None:
    W, H, _ = correlated(5, 20)
    keep = torch.ones(5, 20, dtype=torch.bool)
    assert torch.equal(refit(W, W, keep, H, shift_of(H)), W)
    assert not refit(W, W * 0, ~keep, H, shift_of(H)).any()


def test_zero_hessian() -> None:
    W = torch.ones(2, 4)
    keep = torch.tensor([[True, False, True, False]]).expand(2, 4)
    assert torch.isfinite(refit(W, W * keep, keep, torch.zeros(4, 4), 0.01)).all()
