"""PTQ1.61: the published start, every turn of the fit beside slow references, and matrices of all odd kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import correlated, quadratic
from torch import Tensor

from compressor.formats import ScaledBinary
from compressor.methods import ptq161
from compressor.methods.learned import ScaledBinaryLearner
from compressor.methods.prepared import PreparedLearner
from compressor.methods.ptq161 import Fit, fit_columns, fit_kept, fit_rows, losses, move_signs, salient_inputs, swept
from compressor.methods.quantize_settings import Ptq161Settings
from compressor.methods.quantizers import foresee, quantize
from compressor.methods.statistics import InputStatistics, damped

SETTINGS = Ptq161Settings()


def case(seed: int = 0, m: int = 12, n: int = 20) -> tuple[Tensor, InputStatistics]:
    weight, hessian, tokens = correlated(m, n, seed)
    return weight.float() + 0.3, InputStatistics(hessian.float(), tokens)


def started(seed: int = 0, k: int = 4) -> tuple[Tensor, Tensor, Fit]:
    """Inputs first: T (n, m), damped H, and a fit with nothing at its best."""
    weight, stats = case(seed)
    T, A = weight.T.contiguous(), damped(stats.hessian, 0.01)
    fit = ptq161._start(T, k, 4)
    column = torch.rand(len(fit.plus), generator=torch.Generator().manual_seed(seed)) + 0.5
    return T, A, replace(fit, column=column)


def code_of(weight: Tensor, stats: InputStatistics | None, settings: Ptq161Settings) -> ScaledBinary:
    code = quantize("ptq161", weight, stats, settings).code
    assert isinstance(code, ScaledBinary)
    return code


def test_the_published_start() -> None:
    weight, stats = case()
    code = code_of(weight, stats, Ptq161Settings(fit="paper"))
    strongest = stats.hessian.diagonal().argsort(descending=True)[:4]
    assert code.salient.nonzero().flatten().tolist() == sorted(strongest.tolist())
    for i, row in enumerate(weight):
        binary = row[~code.salient]
        mean = binary.mean()
        assert float(code.mean[i]) == pytest.approx(float(mean), rel=1e-3, abs=1e-4)
        assert float(code.scale[i]) == pytest.approx(float((binary - mean).abs().mean()), rel=1e-3)
        assert torch.equal(code.signs[i], binary >= mean)
    assert torch.equal(code.column, torch.ones(16).half())
    kept = code.dense()[:, code.salient]
    reach = weight[:, code.salient].amax(1) - weight[:, code.salient].amin(1)
    assert ((kept - weight[:, code.salient]).abs().amax(1) <= 0.2 * reach.clamp(min=0.3)).all()


def test_means_and_scales_are_the_least_squares_solution() -> None:
    T, A, fit = started()
    found = fit_rows(T, A, fit)
    C = torch.linalg.cholesky(A.double())
    for i in range(T.shape[1]):
        sign = torch.where(fit.plus[:, i], 1.0, -1.0).double() * fit.column.double()
        basis = torch.zeros(len(T), 2, dtype=torch.float64)
        basis[: len(fit.plus), 0], basis[: len(fit.plus), 1] = sign, fit.column.double()
        rest = T[:, i].double().clone()
        rest[len(fit.plus) :] -= fit.kept[:, i].double()
        scale, mean = torch.linalg.lstsq(C.T @ basis, C.T @ rest[:, None]).solution.flatten().tolist()
        assert float(found.scale[i]) == pytest.approx(abs(scale), rel=1e-3, abs=1e-4)
        assert float(found.mean[i]) == pytest.approx(mean, rel=1e-3, abs=1e-4)


def test_scales_of_inputs_are_the_least_squares_solution() -> None:
    T, A, fit = started(1)
    found = fit_columns(T, A, fit)
    C = torch.linalg.cholesky(A.double())
    binary = len(fit.plus)
    M = fit.rows().double()
    blocks, targets = [], []
    for i in range(T.shape[1]):
        basis = torch.zeros(len(T), binary, dtype=torch.float64)
        basis[:binary] = torch.diag(M[:, i])
        rest = T[:, i].double().clone()
        rest[binary:] -= fit.kept[:, i].double()
        blocks.append(C.T @ basis)
        targets.append(C.T @ rest)
    wanted = torch.linalg.lstsq(torch.cat(blocks), torch.cat(targets)[:, None]).solution.flatten()
    torch.testing.assert_close(found.column.double(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_no_turn_loses(seed: int) -> None:
    T, A, fit = started(seed)
    before = float(losses(T, A, fit).sum())
    for turn in (fit_rows, fit_columns, move_signs, lambda *args: fit_kept(*args, SETTINGS)) * 2:
        fit = turn(T, A, fit)
        now = float(losses(T, A, fit).sum())
        assert now <= before * (1 + 1e-5)
        before = now


def test_moved_signs_are_those_of_one_weight_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    T, A, fit = started(2)
    monkeypatch.setattr(ptq161, "BLOCK", 3)
    found = move_signs(T, A, fit)
    for i in range(T.shape[1]):
        plus = fit.plus[:, i].clone()
        for j in range(len(plus)):
            errors = []
            for choice in (True, False):
                plus[j] = choice
                one = replace(fit, plus=plus[:, None], mean=fit.mean[i : i + 1], scale=fit.scale[i : i + 1])
                one = replace(one, kept=fit.kept[:, i : i + 1])
                errors.append(float(losses(T[:, i : i + 1], A, one)))
            plus[j] = errors[0] <= errors[1]
        assert torch.equal(found.plus[:, i], plus)


def test_feedback_and_turns_pay_on_the_inputs() -> None:
    """Averaged over seeds: start, swept, improved, each better than the one before."""
    totals = [0.0, 0.0, 0.0]
    for seed in range(6):
        weight, stats = case(seed, 16, 30)
        T, A = weight.T.contiguous(), damped(stats.hessian, 0.01)
        start = ptq161._start(T, 6, 4)
        after = swept(T, A, start, SETTINGS)
        fits = (start, after, ptq161.improved(T, A, after, SETTINGS))
        totals = [t + float(losses(T, A, fit).sum()) for t, fit in zip(totals, fits, strict=True)]
    assert totals[1] < 0.8 * totals[0] and totals[2] < 0.8 * totals[1]


def test_the_default_is_better_than_the_published_start_as_stored() -> None:
    for seed in range(4):
        weight, stats = case(seed, 16, 30)
        A = damped(stats.hessian, 0.01, torch.float64)
        both = [code_of(weight, stats, Ptq161Settings(fit=fit)).dense().double() for fit in ("paper", "default")]
        assert quadratic(weight.double(), both[1], A) < 0.7 * quadratic(weight.double(), both[0], A)


@pytest.mark.parametrize("salient", [0.0, 0.2, 0.99])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 23)])
def test_all_shapes_and_shares(salient: float, shape: tuple[int, int]) -> None:
    weight, hessian, tokens = correlated(*shape, 3)
    settings = Ptq161Settings(salient=salient)
    for stats in (None, InputStatistics(hessian.float(), tokens)):
        code = code_of(weight.float(), stats, settings)
        assert torch.isfinite(code.dense()).all()
        assert code.spec(torch.float16) == foresee("ptq161", settings, shape, "float16")


@pytest.mark.parametrize("kind", ["zero", "constant", "outlier", "dead inputs", "tiny", "huge"])
def test_degenerate_matrices_give_finite_values(kind: str) -> None:
    weight, stats = case()
    if kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "constant":
        weight = torch.full_like(weight, 0.25)
    elif kind == "outlier":
        weight[3, 5] = 3e4
    elif kind == "dead inputs":
        stats.hessian[:, 2:9] = stats.hessian[2:9] = 0
    else:
        weight = weight * (1e-7 if kind == "tiny" else 1e3)
    value = code_of(weight, stats, SETTINGS).dense()
    assert torch.isfinite(value).all()
    if kind in ("zero", "constant"):
        torch.testing.assert_close(value, weight, rtol=0.05, atol=1e-3)


def test_the_same_bits_on_any_number_of_threads(on_threads: Callable[..., list[Any]]) -> None:
    weight, hessian, tokens = correlated(90, 140, 2)

    def run() -> Tensor:
        return code_of(weight.float(), InputStatistics(hessian.float(), tokens), SETTINGS).dense()

    assert torch.equal(*on_threads(run))


def test_learning_starts_at_the_code_and_ends_at_a_better_one() -> None:
    weight, stats = case(4)
    code = code_of(weight, stats, SETTINGS)
    learner = ScaledBinaryLearner(code, weight)
    torch.testing.assert_close(learner.weight(), code.dense(), rtol=1e-6, atol=1e-6)
    assert torch.equal(learner.finish().dense(), code.dense())
    target = code.dense() * 1.3
    optimizer = torch.optim.Adam([{"params": [t.requires_grad_()], "lr": 0.05 * p} for t, p in learner.parameters()])
    for _ in range(150):
        optimizer.zero_grad()
        (learner.weight() - target)[:, ~code.salient].square().sum().backward()
        optimizer.step()
    found = learner.finish()
    torch.testing.assert_close(learner.weight().detach(), found.dense(), rtol=1e-5, atol=1e-6)
    binary = ~code.salient
    errors = [(value - target)[:, binary].square().sum() for value in (code.dense(), found.dense())]
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(found.dense()[:, code.salient], code.dense()[:, code.salient])


def test_weights_can_be_prepared_for_binarization() -> None:
    """The change starts at nothing, is of low rank, is seen binarized, and learns."""
    weight, stats = case(6)
    salient = salient_inputs(weight, stats, SETTINGS)
    assert int(salient.sum()) == 4
    assert torch.equal(salient, code_of(weight, stats, SETTINGS).salient)
    learner = PreparedLearner(weight, salient)
    assert torch.equal(learner.finish().weight, weight)
    seen = learner.weight()
    start = code_of(weight, stats, Ptq161Settings(fit="paper", salient=0)).dense()
    assert torch.equal(seen[:, salient], weight[:, salient])
    assert all(len((1e4 * row).round().unique()) <= 2 for row in seen[:, ~salient])
    unsalient = PreparedLearner(weight, torch.zeros_like(salient)).weight()
    torch.testing.assert_close(unsalient, start, rtol=1e-2, atol=1e-3)
    target = 1.5 * seen
    optimizer = torch.optim.Adam([{"params": [t.requires_grad_()], "lr": 0.02 * p} for t, p in learner.parameters()])
    for _ in range(200):
        optimizer.zero_grad()
        (learner.weight() - target).square().sum().backward()
        optimizer.step()
    change = learner.finish().weight - weight
    assert torch.linalg.matrix_rank(change) <= 6
    assert (learner.weight() - target).square().sum() < 0.5 * (seen - target).square().sum()
