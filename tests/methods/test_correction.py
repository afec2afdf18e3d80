"""Low-rank corrections: against the exact truncated SVD, never a loss, and stored as they were fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import correlated, quadratic
from torch import Tensor

from compressor.formats import GroupInt, LowRank, Sum
from compressor.methods import low_rank
from compressor.methods.factors import balanced, best_right
from compressor.methods.learned import FlexRoundLearner, SumLearner, TritLearner
from compressor.methods.low_rank import whitened_low_rank
from compressor.methods.quantize_settings import GptqSettings, QuantizeSettings, RtnSettings, TritPlanesSettings
from compressor.methods.quantizers import foresee, quantize
from compressor.methods.statistics import InputStatistics, damped

METHODS: dict[str, QuantizeSettings] = {
    "rtn": RtnSettings(bits=2, group=16),
    "gptq": GptqSettings(bits=2, group=16),
    "trit-planes": TritPlanesSettings(planes=1, group=16, rounds=1),
}


def case(seed: int = 0, m: int = 24, n: int = 32) -> tuple[Tensor, InputStatistics, Tensor]:
    """A weight, statistics, and the damped Hessian in fp64."""
    weight, hessian, tokens = correlated(m, n, seed)
    stats = InputStatistics(hessian.float(), tokens)
    return weight.float(), stats, damped(stats.hessian, 0.01, torch.float64)


def test_the_term_is_the_truncated_svd_behind_the_whitening() -> None:
    error, stats, A = case()
    C = torch.linalg.cholesky(A)
    P, S, Vt = torch.linalg.svd(error.double() @ C, full_matrices=False)
    for rank in (1, 5, 24):
        best = (P[:, :rank] * S[:rank]) @ Vt[:rank] @ torch.linalg.inv(C)
        left, right = whitened_low_rank(error, stats.factor(0.01).upper, rank)
        torch.testing.assert_close((left @ right).double(), best, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(left.T @ left, torch.eye(rank), rtol=0, atol=1e-5)


def test_iteration_finds_almost_all_that_the_exact_svd_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a flat spectrum, where it is hardest."""
    X = torch.randn(90, 120, generator=torch.Generator().manual_seed(0))
    exact = low_rank.leading_columns(X, 10)
    monkeypatch.setattr(low_rank, "EXACT", 0)
    near = low_rank.leading_columns(X, 10)
    power = [float((Q.T @ X).square().sum()) for Q in (exact, near)]
    assert 0.97 * power[0] <= power[1] <= power[0] * (1 + 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_correction_loses_less_the_higher_its_rank(method: str, bits: Any) -> None:
    weight, stats, A = case()
    losses = []
    for rank in (0, 2, 8):
        settings = METHODS[method].model_copy(update={"correct": rank, "correct_bits": bits})
        code = quantize(method, weight, stats, settings).code
        assert isinstance(code, Sum) is (rank > 0)
        assert code.spec(torch.float16) == foresee(method, settings, (24, 32), "float16")
        losses.append(quadratic(weight.double(), code.dense().double(), A))
    assert losses[2] < losses[1] < losses[0]


def test_full_rank_leaves_only_the_rounding_of_the_factors() -> None:
    weight, stats, A = case()
    settings = RtnSettings(bits=2, group=16, correct=99)
    code = quantize("rtn", weight, stats, settings).code
    assert isinstance(code, Sum) and code.correction.spec(torch.float32)["left"]["shape"] == [24, 24]
    assert quadratic(weight.double(), code.dense().double(), A) < 1e-5 * quadratic(weight.double(), 0 * weight, A)


def test_without_data_it_is_the_plain_error_that_falls() -> None:
    weight, _, _ = case(1)
    plain, more = (
        quantize("rtn", weight, None, RtnSettings(bits=2, group=16, correct=rank, correct_bits=8)).code.dense()
        for rank in (0, 6)
    )
    assert (weight - more).square().sum() < 0.8 * (weight - plain).square().sum()


def test_the_right_factor_is_least_squares_and_bears_a_dependent_left_one() -> None:
    error = torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
    left = torch.randn(12, 3, generator=torch.Generator().manual_seed(4))
    expected = torch.linalg.lstsq(left.double(), error.double()).solution.float()
    torch.testing.assert_close(best_right(left, error), expected)
    left[:, 2] = left[:, 1]
    assert torch.isfinite(best_right(left, error)).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_balanced_factors_fit_fp16_at_any_scale(scale: float) -> None:
    left, right = torch.linalg.qr(torch.randn(40, 4)).Q, scale * torch.randn(4, 30)
    product = balanced(left, right).dense()
    torch.testing.assert_close(product, left @ right, rtol=5e-2, atol=2e-3 * scale)


def test_degenerate_matrices_give_finite_values() -> None:
    _, stats, _ = case()
    for weight in (torch.zeros(6, 32), torch.full((6, 32), 0.25), torch.ones(1, 32)):
        for bits in (16, 4):
            settings = GptqSettings(bits=2, group=16, correct=4, correct_bits=bits)
            value = quantize("gptq", weight, stats, settings).code.dense()
            assert torch.isfinite(value).all() and (value - weight).abs().max() < 0.2


def test_the_same_bits_on_any_number_of_threads(on_threads: Callable[..., list[Any]]) -> None:
    weight, hessian, tokens = correlated(150, 130, 2)

    def run() -> Tensor:
        stats = InputStatistics(hessian.float(), tokens)
        return quantize("gptq", weight.float(), stats, GptqSettings(correct=5, correct_bits=8)).code.dense()

    assert torch.equal(*on_threads(run))


@pytest.mark.parametrize("method", ["rtn", "trit-planes"])
@pytest.mark.parametrize("bits", [16, 8])
def test_sums_learn(method: str, bits: Any) -> None:
    weight, stats, _ = case(5)
    finer = ("bits", 3) if method == "rtn" else ("planes", 2)  # where a target for every single weight can be followed
    settings = METHODS[method].model_copy(update={"correct": 3, "correct_bits": bits, finer[0]: finer[1]})
    code = quantize(method, weight, stats, settings).code
    assert isinstance(code, Sum)
    inner = FlexRoundLearner if isinstance(code.base, GroupInt) else TritLearner
    learner = SumLearner(code, inner(code.base, weight - code.correction.dense()))  # type: ignore[arg-type]
    assert torch.equal(learner.finish().dense(), code.dense())
    torch.testing.assert_close(learner.weight(), code.dense(), rtol=0, atol=1e-6)
    pairs = learner.parameters()
    optimizer = torch.optim.Adam([{"params": [tensor.requires_grad_()], "lr": 0.05 * pace} for tensor, pace in pairs])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    before = float((code.dense() - 1.2 * weight).square().sum())
    for _ in range(150):
        optimizer.zero_grad()
        (learner.weight() - 1.2 * weight).square().sum().backward()
        optimizer.step()
        schedule.step()
    finished = learner.finish()
    assert isinstance(finished.correction, LowRank)
    torch.testing.assert_close(learner.weight().detach(), finished.dense(), rtol=0, atol=1e-5)
    assert float((finished.dense() - 1.2 * weight).square().sum()) < 0.85 * before
    assert torch.equal(finished.correction.dense(), code.correction.dense()) is (bits == 8)
