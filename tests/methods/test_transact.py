"""Neurons: the losses against brute force, the refit against least squares over tokens, never worse than none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import correlated, damped, quadratic
from torch import Tensor

from compressor.methods import transact
from compressor.methods.narrowing import expand_columns, expand_rows
from compressor.methods.statistics import FactorizationError
from compressor.methods.transact import eliminate, narrow_mlp


def best_loss(W: Tensor, A: Tensor, kept: list[int]) -> float:
    """The least tr(D A D^T) with columns ``kept``, by one linear system, in fp64."""
    W, A = W.double(), A.double()
    Q = torch.zeros_like(W)
    Q[:, kept] = torch.linalg.solve(A[kept][:, kept], (W @ A[:, kept]).T).T
    return quadratic(W, Q, A)


def greedy(W: Tensor, A: Tensor, count: int) -> tuple[list[int], list[float]]:
    """Give up one input after another, every one left being tried."""
    order: list[int] = []
    losses = [0.0]
    for _ in range(count):
        rest = [j for j in range(W.shape[1]) if j not in order]
        trials = {j: best_loss(W, A, [k for k in rest if k != j]) for j in rest}
        order.append(min(trials, key=trials.__getitem__))
        losses.append(trials[order[-1]])
    return order, losses


def by_norm(W: Tensor, H: Tensor, keep: int) -> Tensor:
    """The baseline: the inputs with the largest sum of what they give off."""
    return (W.square().sum(0) * H.diagonal()).topk(keep).indices.sort().values


@pytest.mark.parametrize("seed", range(3))
def test_elimination_is_the_greedy_search(seed: int) -> None:
    W, H, _ = correlated(8, 14, seed)
    found = eliminate(W, H, 10)
    order, losses = greedy(W, damped(H, transact.DAMP), 10)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.losses, torch.tensor(losses).double(), rtol=2e-3, atol=0)


def test_losses_are_exact_and_nearly_those_of_the_greedy_search_when_many_go_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W, H, _ = correlated(24, 96, 1)
    slow = eliminate(W, H, 60)
    monkeypatch.setattr(transact, "AT_ONCE", 6)  # 16 a round
    fast = eliminate(W, H, 60)
    assert sorted(fast.order.tolist()) == sorted(set(fast.order.tolist()))
    for count in (7, 16, 33, 60):
        kept = fast.kept(96, 96 - count).tolist()
        assert best_loss(W, damped(H, transact.DAMP), kept) == pytest.approx(float(fast.losses[count]), rel=2e-3)
        assert fast.losses[count] <= 1.05 * slow.losses[count]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [30, 20])
def test_better_than_by_norms(seed: int, keep: int) -> None:
    W, H, _ = correlated(16, 40, seed)
    ours = narrow_mlp(W, H, eliminate(W, H, 40 - keep).kept(40, keep))
    theirs = narrow_mlp(W, H, by_norm(W, H, keep))
    assert ours.loss < theirs.loss


def test_one_of_two_alike_is_enough() -> None:
    """Every neuron has a loud double that it can be made from: norms keep both of the loudest."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=g) * torch.linspace(1, 2, 10)
    x = torch.cat([x, 1.5 * x + 0.01 * torch.randn(200, 10, generator=g)], 1)
    W = torch.randn(8, 20, generator=g)
    H = x.T @ x
    ours = narrow_mlp(W, H, eliminate(W, H, 10, damp=1e-4).kept(20, 10), damp=1e-4)
    assert ours.relative_loss < 1e-3 < 0.02 < narrow_mlp(W, H, by_norm(W, H, 10), damp=1e-4).relative_loss


def test_the_refit_is_least_squares_over_the_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(90, 20, generator=g) @ torch.randn(20, 20, generator=g), torch.randn(6, 20, generator=g)
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 11, 12, 15, 19])
    found = narrow_mlp(W, x.T @ x, kept, damp=1e-7)
    exact = torch.linalg.lstsq(x[:, kept].double(), (x @ W.T).double()).solution.T
    torch.testing.assert_close(found.down.double(), exact, rtol=1e-3, atol=1e-3)
    error = (x @ W.T - x[:, kept] @ found.down.T).double().square().sum()
    assert found.loss == pytest.approx(float(error), rel=1e-4)
    assert found.relative_loss == pytest.approx(float(error / (x @ W.T).double().square().sum()), rel=1e-4)


shapes = st.tuples(st.integers(1, 9), st.integers(2, 16), st.integers(1, 30), st.integers(0, 5))


@given(shapes, st.floats(0.05, 1.0), st.integers(0, 10**6), st.sampled_from([1e-6, 0.01, 1.0]))
@settings(max_examples=120, deadline=None)
def test_never_worse_than_no_refit(shape: tuple[int, int, int, int], share: float, seed: int, damp: float) -> None:
    """Few tokens, one token and dead inputs among them."""
    m, n, tokens, dead = shape
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(tokens, n, generator=g), torch.randn(m, n, generator=g)
    x[:, :dead] = 0
    H = x.T @ x
    keep = max(1, round(share * n))
    order = eliminate(W, H, n - keep, damp)
    kept = order.kept(n, keep)
    fitted, plain = (narrow_mlp(W, H, kept, damp, compensate=way) for way in (True, False))
    assert fitted.down.shape == (m, keep) and bool(torch.isfinite(fitted.down).all())
    assert fitted.loss <= plain.loss * (1 + 1e-5) + 1e-6
    assert bool((order.losses.diff() >= 0).all())
    if dead and n - keep:
        gone = min(dead, n, n - keep)
        assert sorted(order.order[:gone].tolist()) == list(range(gone)) or gone < min(dead, n)
        assert bool((order.order[:gone] < dead).all()) and float(order.losses[gone]) == 0


def test_nothing_given_up_is_nothing_changed() -> None:
    W, H, _ = correlated(5, 12)
    found = narrow_mlp(W, H, eliminate(W, H, 0).kept(12, 12))
    assert torch.equal(found.down, W) and found.loss == 0 == found.relative_loss


def test_one_token_needs_one_input() -> None:
    g = torch.Generator().manual_seed(1)
    x, W = torch.randn(1, 8, generator=g), torch.randn(3, 8, generator=g)
    H = x.T @ x
    kept = eliminate(W, H, 7).kept(8, 1)
    assert narrow_mlp(W, H, kept, damp=1e-6).relative_loss < 1e-6
    assert narrow_mlp(W, H, kept, compensate=False).relative_loss > 0.1


def test_what_is_refused() -> None:
    W, H, _ = correlated(4, 6)
    for count in (-1, 6):
        with pytest.raises(ValueError, match="given up"):
            eliminate(W, H, count)
    with pytest.raises(FactorizationError):
        eliminate(W, H * torch.nan, 2)


def test_the_same_on_any_number_of_threads(on_threads: Callable[..., list[Any]]) -> None:
    W, H, _ = correlated(70, 200)

    def solve() -> list[Tensor]:
        found = eliminate(W, H, 90)
        return [found.order, found.losses, narrow_mlp(W, H, found.kept(200, 110)).down]

    one, two = on_threads(solve)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("act", [torch.nn.functional.silu, torch.sigmoid])
def test_an_expanded_mlp_gives_what_the_narrow_one_gives(act: Callable[[Tensor], Tensor]) -> None:
    g = torch.Generator().manual_seed(2)
    gate, up, down = (torch.randn(*shape, generator=g) for shape in ((20, 6), (20, 6), (5, 20)))
    gate_bias, up_bias = torch.randn(20, generator=g), torch.randn(20, generator=g)
    x, kept = torch.randn(30, 6, generator=g), torch.tensor([1, 4, 5, 9, 10, 17])

    def inner(rows: Callable[[Tensor], Tensor]) -> Tensor:
        return act(x @ rows(gate).T + rows(gate_bias)) * (x @ rows(up).T + rows(up_bias))

    full = inner(lambda weight: weight)
    narrow = narrow_mlp(down, full.T @ full, kept)
    expected = inner(lambda weight: weight[kept]) @ narrow.down.T
    expanded = (
        inner(lambda weight: expand_rows(weight[kept], kept, len(weight))) @ expand_columns(narrow.down, kept, 20).T
    )
    torch.testing.assert_close(expanded, expected)
    assert int((expand_columns(narrow.down, kept, 20) != 0).any(0).sum()) == 6
