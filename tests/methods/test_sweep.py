"""The contract of the column sweep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.methods.sweep import Swept, sweep
from tests.methods import reference
from tests.methods.reference import correlated

SHAPES = [(1, 1), (1, 5), (3, 17), (5, 130), (70, 100), (40, 300), (129, 128)]


def problem(m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, U in fp32, and the damped H in fp64."""
    W, H, _ = correlated(m, n, seed)
    return W, reference.published_factor(H, 0.01).float(), reference.damped(H, 0.01)


def fixed(mask: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda start, columns: mask.T[start : start + len(columns)]


def random_mask(m: int, n: int) -> Tensor:
    return torch.rand(m, n, generator=torch.Generator().manual_seed(9)) < 0.5


def close(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> bool:
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm()) + 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_identity_is_bit_exact(m: int, n: int) -> None:
    W, U, _ = problem(m, n)
    before = W.clone()
    for swept in (sweep(W, U), sweep(W, U, snap=lambda j, w: w, block=32)):
        assert torch.equal(swept.weight, W)
        assert swept.mask.all() and not swept.loss.any()
    assert torch.equal(W, before)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("grid", [None, 0.25])
def test_loss_is_the_true_quadratic_form(m: int, n: int, grid: float | None) -> None:
    W, U, H = problem(m, n)
    snap = None if grid is None else (lambda j, w: (w / grid).round() * grid)
    swept = sweep(W, U, decide=fixed(random_mask(m, n)), snap=snap)
    D = W.double() - swept.weight.double()
    assert torch.allclose(swept.loss, ((D @ H) * D).sum(1) / 2, rtol=1e-3, atol=1e-6)
    assert float(swept.loss.sum()) == pytest.approx(reference.quadratic(W, swept.weight, H) / 2, rel=1e-3, abs=1e-6)
    assert not swept.weight[~random_mask(m, n)].any()


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("block", [1, 7, 16, 128, 10_000])
@pytest.mark.parametrize("snapped", [False, True])
def test_block_size_does_not_matter_for_a_fixed_mask(m: int, n: int, block: int, snapped: bool) -> None:
    W, U, _ = problem(m, n)
    mask = random_mask(m, n)
    slow = reference.sweep(W, U, lambda j, now: None, lambda j, w: w * mask[:, j])
    # a snap that halves columns is continuous, so that rounding cannot tip a weight to another grid point
    snap = (lambda j, w: w / 2 if j % 3 == 0 else w) if snapped else None
    if snapped:
        slow = reference.sweep(W, U, lambda j, now: None, lambda j, w: (w / 2 if j % 3 == 0 else w) * mask[:, j])
    assert close(sweep(W, U, decide=fixed(mask), snap=snap, block=block).weight, slow)


@pytest.mark.parametrize("span", [1, 2, 3, 4, 5, 8, 16, 24, 32, 48, 96, 130, 1000])
@pytest.mark.parametrize("block", [1, 32, 100])
def test_decisions_see_fully_updated_columns(span: int, block: int) -> None:
    m, n = 6, 130
    W, U, _ = problem(m, n)
    seen: dict[int, Tensor] = {}
    expected: dict[int, Tensor] = {}

    def decide(start: int, columns: Tensor) -> Tensor:
        seen[start] = columns.clone()
        return (torch.arange(start, start + len(columns)) % 3 > 0)[:, None].expand_as(columns)

    def choose(j: int, now: Tensor) -> None:
        if j % span == 0:
            expected[j] = now[:, j : j + span].T.clone()

    sweep(W, U, decide=decide, span=span, block=block)
    reference.sweep(W, U, choose, lambda j, w: w * (j % 3 > 0))
    assert seen.keys() == expected.keys()
    assert all(close(seen[j], expected[j]) for j in seen)


def test_group_parameters_come_from_updated_weights() -> None:
    """A snap whose grid is set by ``decide`` at every group start, as GPTQ's are."""
    m, n, group = 9, 96, 16
    W, U, _ = problem(m, n)
    scales: dict[int, Tensor] = {}

    def decide(start: int, columns: Tensor) -> None:
        scales[start] = columns.abs().amax(0) / 7

    def snap(j: int, w: Tensor) -> Tensor:
        scale = scales[j - j % group]
        return (w / scale).round() * scale

    got = sweep(W, U, decide=decide, span=group, snap=snap)
    slow_scales: dict[int, Tensor] = {}

    def choose(j: int, now: Tensor) -> None:
        if j % group == 0:
            slow_scales[j] = now[:, j : j + group].abs().amax(1) / 7

    slow = reference.sweep(
        W, U, choose, lambda j, w: (w / slow_scales[j - j % group]).round() * slow_scales[j - j % group]
    )
    same = torch.isclose(got.weight.double(), slow, rtol=1e-3, atol=1e-4).double().mean()
    assert same > 0.98  # a rare weight stands on the edge between two grid points


def test_zero_columns_stay_zero() -> None:
    W, H, _ = correlated(8, 40)
    H[7] = H[:, 7] = 0
    H[7, 7] = 1
    W[:, 7] = 0
    swept = sweep(W, reference.published_factor(H, 0.01).float(), decide=fixed(random_mask(8, 40)))
    assert not swept.weight[:, 7].any() and torch.isfinite(swept.weight).all()


def test_block_diagonal_hessian_is_independent_solves() -> None:
    parts = [problem(6, n, seed) for seed, n in enumerate((30, 50, 20))]
    W = torch.cat([p[0] for p in parts], 1)
    U = torch.block_diag(*[p[1] for p in parts])
    mask = random_mask(6, 100)
    whole = sweep(W, U, decide=fixed(mask))
    at = 0
    loss = torch.zeros(6, dtype=torch.float64)
    for part, upper, _ in parts:
        n = part.shape[1]
        alone = sweep(part, upper, decide=fixed(mask[:, at : at + n].contiguous()))
        assert torch.allclose(whole.weight[:, at : at + n], alone.weight, rtol=1e-4, atol=1e-5)
        loss += alone.loss
        at += n
    assert torch.allclose(whole.loss, loss, rtol=1e-5)


def test_any_column_order_gives_the_loss_formula() -> None:
    W, H, _ = correlated(5, 60)
    mask = random_mask(5, 60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    swept = sweep(W[:, order], reference.published_factor(H[order][:, order], 0.01).float(), decide=fixed(mask))
    A = reference.damped(H, 0.01)[order][:, order]
    assert float(swept.loss.sum()) == pytest.approx(reference.quadratic(W[:, order], swept.weight, A) / 2, rel=1e-3)


@pytest.mark.parametrize(("m", "n"), [(3, 17), (5, 130), (300, 520), (3001, 150), (11003, 40)])
def test_same_bits_on_one_and_two_threads(m: int, n: int, on_threads: Callable[..., list[Swept]]) -> None:
    W, U, _ = problem(m, n)
    for snap in (None, lambda j, w: (w * 4).round() / 4):
        one, two = on_threads(lambda s: sweep(W, U, decide=fixed(random_mask(m, n)), snap=s), snap)
        assert torch.equal(one.weight, two.weight) and torch.equal(one.loss, two.loss)
