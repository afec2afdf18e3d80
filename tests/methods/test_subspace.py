"""The closed form of low rank: its loss, its optimality against brute force, and every awkward shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.methods import subspace
from compressor.methods.subspace import Components, components, in_basis, output_basis, weighing

SHAPES = [(6, 6), (12, 5), (5, 12), (1, 7), (7, 1), (16, 4)]


def inputs(n: int, tokens: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, n + 1, dtype=torch.float64) ** -0.7
    return torch.randn(tokens, n, generator=g, dtype=torch.float64) * sizes


def weight_of(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 100))


def output_cost(m: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 200)
    root = torch.randn(m, m, generator=g, dtype=torch.float64) * torch.rand(m, generator=g, dtype=torch.float64)
    return root @ root.T


def loss(error: Tensor, H: Tensor | None, F: Tensor | None = None) -> float:
    """tr(F E H E^T), by the definition."""
    E = error.double()
    inner = E @ E.T if H is None else E @ H.double() @ E.T
    return float((inner if F is None else F.double() @ inner).trace())


def cut(parts: Components, rank: int) -> Tensor:
    return parts.left[:, :rank].double() @ parts.right[:rank].double()


def damped(F: Tensor, W: Tensor, damp: float) -> Tensor:
    """F as the closed form sees it: damped in the coordinates of the outputs that W has."""
    Q = output_basis(W)
    Q = torch.eye(W.shape[0], dtype=torch.float64) if Q is None else Q
    inner = Q.T @ F @ Q
    return Q @ (inner + damp * inner.diagonal().mean() * torch.eye(len(inner), dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_the_loss_is_the_sum_of_what_was_dropped(m: int, n: int, weighted: bool, tokens: int) -> None:
    """At every rank, also with one token, fewer tokens than inputs, wide and tall matrices."""
    x, W = inputs(n, tokens), weight_of(m, n)
    H, F = x.T @ x, output_cost(m) if weighted else None
    parts = components(W, H, None if F is None else in_basis(F, W), damp=0.01)
    metric = None if F is None else damped(F, W, 0.01)
    scale = float(parts.values.sum())
    for rank in range(1, min(m, n) + 1):
        wanted = float(parts.values[rank:].sum())
        assert loss(W.double() - cut(parts, rank), H, metric) == pytest.approx(wanted, abs=2e-5 * scale)
    assert torch.allclose(cut(parts, min(m, n)), W.double(), atol=1e-4)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_matrix_of_that_rank_is_better(m: int, n: int, weighted: bool) -> None:
    """Against the textbook: the truncated SVD of F^(1/2) W H^(1/2), transformed back by inverses."""
    x, W = inputs(n, 300), weight_of(m, n)
    H = x.T @ x
    F = damped(output_cost(m), W, 0.01) + 1e-9 * torch.eye(m, dtype=torch.float64) if weighted else None
    parts = components(W, H, None if F is None else in_basis(F, W), damp=1e-9)
    hs = torch.linalg.cholesky(H)
    fs = torch.eye(m, dtype=torch.float64) if F is None else torch.linalg.cholesky(F).T
    U, s, V = torch.linalg.svd(fs @ W.double() @ hs, full_matrices=False)
    for rank in range(1, min(m, n)):
        best = torch.linalg.inv(fs) @ (U[:, :rank] * s[:rank]) @ V[:rank] @ torch.linalg.inv(hs)
        ours = loss(W.double() - cut(parts, rank), H, F)
        assert ours == pytest.approx(loss(W.double() - best, H, F), rel=1e-3, abs=1e-6 * float((s**2).sum()))


def test_gradient_descent_finds_nothing_better() -> None:
    """Brute force on a small case, with a singular H and weighted outputs."""
    x, W = inputs(5, 3), weight_of(6, 5)
    H, F = x.T @ x, output_cost(6)
    parts = components(W, H, in_basis(F, W), damp=0.01)
    metric = damped(F, W, 0.01)
    ours = loss(W.double() - cut(parts, 2), H, metric)
    found = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        L = torch.randn(6, 2, generator=g, dtype=torch.float64).requires_grad_(True)
        R = torch.randn(2, 5, generator=g, dtype=torch.float64).requires_grad_(True)
        optimizer = torch.optim.LBFGS([L, R], max_iter=300, line_search_fn="strong_wolfe")

        def closure(L: Tensor = L, R: Tensor = R, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            E = W.double() - L @ R
            value = (metric @ E @ H @ E.T).trace()
            value.backward()
            return value

        optimizer.step(closure)
        found.append(float(closure().detach()))
    assert ours <= min(found) * 1.001 + 1e-9
    assert ours == pytest.approx(min(found), rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 1000))
def test_rank_deficient_weights_are_met_exactly(m: int, n: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    x = inputs(n, 20, seed)
    parts = components(W, x.T @ x)
    kept = max(1, min(rank, m, n))
    assert loss(W.double() - cut(parts, kept), x.T @ x) <= 1e-8 * (1 + float((W.double() @ x.T).square().sum()))
    assert bool((parts.values >= 0).all()) and bool((parts.values.diff() <= 0).all())


def test_zeros_everywhere_do_no_harm() -> None:
    W = weight_of(4, 6)
    for H, F in [(torch.zeros(6, 6), None), (torch.eye(6), torch.zeros(4, 4))]:
        parts = components(W, H, F)
        assert torch.isfinite(parts.left).all() and torch.isfinite(parts.right).all()
        assert torch.allclose(cut(parts, 4), W.double(), atol=1e-5)


def test_a_root_shows_components_that_a_square_would_drown() -> None:
    """Inputs whose sizes span ten orders of magnitude, as a second moment given for a root has them."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
    C = basis * torch.logspace(0, -10, 8, dtype=torch.float64) @ basis.T
    W = weight_of(8, 8)
    U, s, _ = torch.linalg.svd(W.double() @ C)
    parts = components(W, C, rooted=True)
    assert torch.allclose(parts.values, s.square(), rtol=1e-4, atol=0)
    last = U[:, -1:] @ U[:, -1:].T @ W.double()
    assert torch.allclose(parts.left[:, -1:].double() @ parts.right[-1:].double(), last, atol=1e-4)


def test_a_target_in_the_span_is_taken_apart_in_its_stead() -> None:
    """What drift asks for: W (I + D), in the coordinates of W's outputs."""
    x, W = inputs(4, 50), weight_of(9, 4)
    target = W @ (torch.eye(4) + 0.1 * weight_of(4, 4, 7))
    F = in_basis(output_cost(9), W)
    parts = components(W, x.T @ x, F, target=target)
    assert torch.allclose(cut(parts, 4), target.double(), atol=1e-4)


def test_weighing_is_the_metric_of_the_closed_form() -> None:
    W, F = weight_of(9, 4), output_cost(9)
    X = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = weighing(in_basis(F, W), W, 0.01)(X)
    assert torch.allclose(got, damped(F, W, 0.01) @ X, rtol=1e-4, atol=1e-6 * float(F.abs().max()))


@pytest.mark.parametrize(("m", "n"), [(200, 200), (300, 150)])
@pytest.mark.parametrize("weighted", [False, True])
def test_single_precision_loses_no_more_at_half_the_components(
    m: int, n: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done with large matrices, tried on small ones."""
    x, W = inputs(n, 2 * n), weight_of(m, n)
    H, F = x.T @ x, output_cost(m)
    losses = []
    for exact in (10_000, 10):
        monkeypatch.setattr(subspace, "EXACT", exact)
        parts = components(W, H, in_basis(F, W) if weighted else None)
        monkeypatch.setattr(subspace, "EXACT", 10_000)
        metric = damped(F, W, 0.01) if weighted else None
        losses.append([loss(W.double() - cut(parts, rank), H, metric) for rank in (min(m, n) // 4, min(m, n) // 2)])
    assert losses[1] == pytest.approx(losses[0], rel=0.002)
    assert losses[1] != losses[0]


def test_the_same_bits_on_any_number_of_threads() -> None:
    W, x = weight_of(96, 160), inputs(160, 300)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(components(W, (x.T @ x).float()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].left, found[1].left) and torch.equal(found[0].right, found[1].right)
