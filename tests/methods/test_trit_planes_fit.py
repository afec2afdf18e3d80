"""Trit planes: against brute force, the published fit as a reference, error feedback, odd groups, pruned weights."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from compressor.formats import TritPlanes
from compressor.methods.quadratic import layer_error
from compressor.methods.quantize_settings import TritPlanesSettings
from compressor.methods.quantizers import quantize
from compressor.methods.statistics import InputStatistics
from compressor.methods.trit_fit import many_starts, nearest_values, published


def data(m: int, n: int, seed: int = 0) -> tuple[Tensor, InputStatistics]:
    """A weight with heavy tails, and statistics of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / torch.arange(1, n + 1).sqrt()
    x = torch.randn(4 * n, n, generator=generator) @ mix
    weight = torch.randn(m, n, generator=generator) * (1 + torch.randn(m, n, generator=generator).square())
    return weight, InputStatistics(x.T @ x, len(x))


def fitted(weight: Tensor, stats: InputStatistics | None, frozen: Tensor | None = None, **given: object) -> TritPlanes:
    code = quantize("trit-planes", weight, stats, TritPlanesSettings(**given), frozen).code  # type: ignore[arg-type]
    assert isinstance(code, TritPlanes)
    return code


def brute_force(x: Tensor) -> float:
    """The least squared error of one group (c,) with two planes: all trits, their best scales."""
    best = float("inf")
    columns = [torch.tensor(t, dtype=torch.float64) for t in product((-1, 0, 1), repeat=len(x))]
    for i, first in enumerate(columns):
        for second in columns[: i + 1]:
            T = torch.stack([first, second], dim=1)
            scale = torch.linalg.lstsq(T, x.double()[:, None], driver="gelsd").solution
            best = min(best, float((x.double() - (T @ scale)[:, 0]).square().sum()))
    return best


def test_many_starts_reach_the_optimum_of_tiny_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    reached = 0
    for _ in range(12):
        x = torch.randn(4, generator=generator)
        scale = many_starts(x[:, None], torch.ones(4, 1), 2, finalists=1)[:, 0]
        loss = float((x[:, None] - nearest_values(x[:, None], scale)).square().sum())
        least = brute_force(x)
        assert loss >= least - 1e-5
        reached += loss <= least + 0.02 * float(x.square().sum())
    assert reached >= 9


def reference_published(x: Tensor) -> Tensor:
    """PTQTP's algorithm 1 for one group (c,) and two planes, as written, in fp64; returns the fit (c,)."""
    x = x.double()
    T = torch.stack([x.sign(), x.sign()], dim=1)
    a = torch.ones(2, dtype=torch.float64)
    order = sorted(product((-1, 0, 1), repeat=2), key=lambda t: (abs(t[0]) + abs(t[1]), abs(t[0]), -t[0], -t[1]))
    combinations = torch.tensor(order, dtype=torch.float64)
    for _ in range(50):
        ridge = 1e-8
        while True:
            A = T.T @ T + ridge * torch.eye(2, dtype=torch.float64)
            if A.norm() * torch.linalg.inv(A).norm() <= 1e6 or ridge >= 1:
                break
            ridge *= 10
        new = torch.linalg.inv(A) @ T.T @ x
        moved = float((new - a).norm())
        a = new
        if moved < 1e-4:
            break
        levels = combinations.float() @ a.float()  # so that equal scales make equal levels, and ties are ties
        T = combinations[(x.float()[:, None] - levels).abs().argmin(1)]
    stored = a.abs().half().double()
    levels = combinations @ stored
    return levels[(x[:, None] - levels).abs().argmin(1)].float()


def test_the_published_fit_is_that_of_the_paper() -> None:
    X = torch.randn(64, 20, generator=torch.Generator().manual_seed(2))
    fit = nearest_values(X, published(X, 2))
    reference = torch.stack([reference_published(x) for x in X.T], dim=1)
    ours, theirs = ((X - q).square().sum(0) for q in (fit, reference))
    assert torch.allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_feedback_and_refit_pay_at_the_same_bytes(planes: int) -> None:
    ratios = []
    for seed in range(3):
        weight, stats = data(24, 96, seed)
        errors = {}
        for fit in ("paper", "data-free", "default"):
            code = fitted(weight, stats, planes=planes, group=32, fit=fit)
            errors[fit] = layer_error(weight, code.dense(), stats.hessian)[1]
        assert errors["default"] < errors["data-free"]
        ratios.append(errors["default"] / errors["paper"])
    assert sum(ratios) / 3 < 0.6


def test_more_rounds_never_harm() -> None:
    weight, stats = data(16, 64)
    losses = [
        layer_error(weight, fitted(weight, stats, group=16, rounds=rounds).dense(), stats.hessian)[1]
        for rounds in range(4)
    ]
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fit", ["paper", "data-free", "default"])
@pytest.mark.parametrize(("m", "n", "group"), [(3, 10, 4), (5, 7, 128), (1, 1, 1), (4, 33, "row")])
def test_odd_shapes_and_canonical_scales(fit: str, m: int, n: int, group: object) -> None:
    weight, stats = data(m, n)
    code = fitted(weight, stats, group=group, fit=fit)
    assert code.dense().shape == (m, n)
    assert (code.scale >= 0).all() and (code.scale[:-1] >= code.scale[1:]).all()
    assert layer_error(weight, code.dense(), stats.hessian)[1] < 1


@pytest.mark.parametrize("fit", ["paper", "data-free", "default"])
def test_strange_groups(fit: str) -> None:
    weight, stats = data(4, 16)
    weight[0] = 0
    weight[1] = 2.5
    weight[2, 3] = 1e6  # beyond fp16
    weight[3] *= 1e-9
    value = fitted(weight, stats, group=8, fit=fit).dense()
    assert torch.isfinite(value).all()
    assert not value[0].any()
    assert torch.allclose(value[1], weight[1], rtol=0.05) or fit == "default"


@pytest.mark.parametrize("fit", ["paper", "data-free", "default"])
def test_pruned_weights_stay_zero(fit: str) -> None:
    weight, stats = data(8, 40)
    frozen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    code = fitted(weight, stats, frozen, group=16, fit=fit)
    assert not code.trits[:, frozen].any()


def test_without_data_the_weights_alone_are_fitted_and_it_is_said() -> None:
    weight, _ = data(6, 20)
    quantized = quantize("trit-planes", weight, None, TritPlanesSettings(group=10))
    assert "weights alone" in quantized.notes[0]
    assert torch.equal(quantized.code.dense(), fitted(weight, None, group=10, fit="data-free").dense())
