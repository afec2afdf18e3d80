"""GPTQ and rounding to nearest: the published loop, what refining promises, and every awkward group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.formats.group_int import GroupInt, layout_group_int, portable_scale
from compressor.methods import gptq, round_nearest
from compressor.methods.code_descent import descend
from compressor.methods.gptq import drift_target, settling_order
from compressor.methods.int_grid import best_grids, candidate_grids, grid_errors
from compressor.methods.quadratic import row_losses
from compressor.methods.quantize_settings import GptqSettings, RtnSettings
from compressor.methods.rtn import round_to_nearest
from compressor.methods.statistics import InputStatistics

PUBLISHED: dict[str, Any] = {"act_order": False, "clip": False, "refine": 0}


def problem(m: int = 24, n: int = 64, tokens: int = 400, seed: int = 0) -> tuple[Tensor, InputStatistics]:
    """Return a weight and the statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    X = torch.randn(tokens, n, generator=generator) @ mixing * torch.rand(n, generator=generator).mul(3)
    return torch.randn(m, n, generator=generator), InputStatistics(X.T @ X, tokens)


def loss(weight: Tensor, code: GroupInt, stats: InputStatistics) -> float:
    return float(row_losses(weight - code.dense(), stats.hessian).sum())


def run(weight: Tensor, stats: InputStatistics | None, **settings: Any) -> GroupInt:
    code = gptq.solve(weight, stats, GptqSettings(**settings)).code
    assert isinstance(code, GroupInt)
    return code


def nearest(weight: Tensor, **settings: Any) -> GroupInt:
    code = round_nearest.solve(weight, None, RtnSettings(**settings)).code
    assert isinstance(code, GroupInt)
    return code


def same(a: GroupInt, b: GroupInt) -> bool:
    zeros = [torch.zeros(1) if code.zero is None else code.zero for code in (a, b)]
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(*zeros)


def published_loop(weight: Tensor, hessian: Tensor, damp: float, bits: int, width: int) -> Tensor:
    """GPTQ column by column in fp64, symmetric grids of a group's updated weights; as in the paper's algorithm 1."""
    W, H = weight.double().clone(), hessian.double().clone()
    n = W.shape[1]
    H += damp * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q, top = torch.zeros_like(W), 2 ** (bits - 1)
    for j in range(n):
        if j % width == 0:
            largest = W[:, j : j + width].abs().amax(1)
            scale = (largest * 2 / (2**bits - 1)).half().bfloat16().double()
        Q[:, j] = (W[:, j] / scale).round().clamp(-top, top - 1) * scale
        error = (W[:, j] - Q[:, j]) / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
    return Q.float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, "row"])
def test_the_published_loop(bits: int, group: Any) -> None:
    weight, stats = problem()
    found = run(weight, stats, bits=bits, group=group, block=32, **PUBLISHED).dense()
    width = 64 if group == "row" else group
    assert torch.equal(found, published_loop(weight, stats.hessian, 0.01, bits, width))


def test_the_order_is_one_of_the_inputs_and_not_of_what_is_stored() -> None:
    """Settling the inputs in another order is the same as giving them in that order."""
    weight, stats = problem()
    order = settling_order(stats.hessian.diagonal(), 16)
    ordered = InputStatistics(stats.hessian[order][:, order], stats.tokens)
    expected = run(weight[:, order], ordered, bits=3, group=16, act_order=False, refine=0)
    found = run(weight, stats, bits=3, group=16, act_order=True, refine=0)
    assert torch.equal(found.dense()[:, order], expected.dense())
    assert not same(found, run(weight, stats, bits=3, group=16, act_order=False, refine=0))


def test_settling_order() -> None:
    diagonal = torch.tensor([1.0, 2.0, 3.0, 9.0, 2.0, 2.0, 0.0, 9.0])
    assert settling_order(diagonal, 2).tolist() == [3, 2, 7, 6, 1, 0, 4, 5]
    assert settling_order(diagonal, 8).tolist() == [3, 7, 2, 1, 4, 5, 0, 6]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_without_correlations_it_rounds_to_nearest(asymmetric: bool, clip: bool) -> None:
    weight, _ = problem()
    stats = InputStatistics(torch.eye(64), 64)
    settings = {"bits": 3, "group": 16, "asymmetric": asymmetric, "clip": clip}
    assert same(run(weight, stats, refine=0, **settings), nearest(weight, **settings))
    assert same(run(weight, None, **settings), nearest(weight, **settings))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_each_step_lowers_the_loss(bits: int, asymmetric: bool) -> None:
    """On average over seeds: search, feedback, search with feedback, refining."""
    sums = torch.zeros(5, dtype=torch.float64)
    settings: dict[str, Any] = {"bits": bits, "group": 16, "asymmetric": asymmetric}
    for seed in range(4):
        weight, stats = problem(seed=seed)
        steps = [
            nearest(weight, clip=False, **settings),
            nearest(weight, **settings),
            run(weight, stats, **PUBLISHED | settings),
            run(weight, stats, refine=0, **settings),
            run(weight, stats, **settings),
        ]
        sums += torch.tensor([loss(weight, step, stats) for step in steps])
    without_search, searched, fed_back, both, refined = sums.tolist()
    assert searched < without_search and fed_back < without_search
    assert both < searched and both < fed_back and refined < both


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [16, "row"])
def test_refining_never_makes_a_row_worse(bits: int, group: Any) -> None:
    for seed in range(2):
        weight, stats = problem(n=160, seed=seed)  # a row is more than one block of descent
        shift = stats.shift(0.01)
        H = stats.hessian + shift * torch.eye(160)
        before = run(weight, stats, bits=bits, group=group, refine=0)
        rows = row_losses(weight - before.dense(), H)
        for rounds in (1, 2, 6):
            after = row_losses(weight - descend(weight, before, stats.hessian, shift, rounds).dense(), H)
            assert (after <= rows * (1 + 1e-5)).all() and after.sum() < rows.sum()
            rows = after


def descent(weight: Tensor, code: GroupInt, hessian: Tensor, shift: float, frozen: Tensor) -> Tensor:
    """One round of descent as it is defined, in fp64, one weight after another; the values (m, n)."""
    A = hessian.double() + shift * torch.eye(len(hessian), dtype=torch.float64)
    m, n = weight.shape
    width, top = n // code.scale.shape[1], 2 ** (code.bits - 1)
    zero = torch.zeros_like(code.scale) if code.zero is None else code.zero
    offsets, scale = (code.codes - zero.repeat_interleave(width, 1)).double(), code.scale.double().clone()
    for i, start in product(range(m), range(0, n, width)):
        group, g = slice(start, start + width), start // width
        for j in range(start, start + width):
            R = (weight[i].double() - offsets[i] * scale[i].repeat_interleave(width)) @ A
            best = round(float(offsets[i, j] + R[j] / A[j, j] / scale[i, g]))
            if not frozen[i, j]:
                offsets[i, j] = min(max(best, -top - int(zero[i, g])), top - 1 - int(zero[i, g]))
        c = offsets[i, group]
        R = (weight[i].double() - offsets[i] * scale[i].repeat_interleave(width)) @ A
        curvature, gain = float(c @ A[group, group] @ c), float(R[group] @ c)
        rounded = portable_scale((scale[i, g] + gain / curvature).float(), code.bits).double() if curvature else 0
        step = float(rounded - scale[i, g])
        if step * (2 * gain - step * curvature) > 0:
            scale[i, g] = rounded
    return (offsets * scale.repeat_interleave(width, 1)).float()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n", "group"), [(40, 40), (40, 8), (160, 160)])  # several panels, groups, blocks
def test_descent_is_what_it_is_defined_to_be(n: int, group: int, asymmetric: bool) -> None:
    weight, stats = problem(m=5, n=n)
    shift = stats.shift(0.01)
    before = nearest(weight, bits=3, group=group, asymmetric=asymmetric)
    frozen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    found = descend(weight, before, stats.hessian, shift, 1, frozen)
    assert torch.allclose(found.dense(), descent(weight, before, stats.hessian, shift, frozen), rtol=1e-6)
    assert torch.equal(found.codes[frozen], before.codes[frozen])


def test_where_refining_ends_no_single_code_is_better() -> None:
    weight, stats = problem(m=3, n=8)
    shift = stats.shift(0.01)
    H = stats.hessian + shift * torch.eye(8)
    code = descend(weight, nearest(weight, bits=2, group=4), stats.hessian, shift, 50)
    rows = row_losses(weight - code.dense(), H)
    for j, value in product(range(8), range(-2, 2)):
        codes = code.codes.clone()
        codes[:, j] = value
        other = GroupInt(codes, code.scale, None, 2)
        assert (row_losses(weight - other.dense(), H) >= rows * (1 - 1e-5)).all()
    scale = code.scale * 1.02  # nor a scale
    for group in (slice(0, 1), slice(1, 2)):
        nudged = code.scale.clone()
        nudged[:, group] = scale[:, group]
        assert (row_losses(weight - GroupInt(code.codes, nudged, None, 2).dense(), H) >= rows * (1 - 1e-5)).all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("refine", [0, 4])
def test_pruned_weights_stay_zero_and_the_others_make_up_for_it(asymmetric: bool, refine: int) -> None:
    weight, stats = problem()
    frozen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = weight.masked_fill(frozen, 0)
    settings = GptqSettings(bits=3, group=16, asymmetric=asymmetric, refine=refine)
    code = gptq.solve(weight, stats, settings, frozen).code
    assert isinstance(code, GroupInt)
    assert (code.dense()[frozen] == 0).all() and (code.dense()[~frozen] != 0).any()
    rounded = round_nearest.solve(weight, None, RtnSettings(bits=3, group=16, asymmetric=asymmetric), frozen).code
    assert isinstance(rounded, GroupInt) and (rounded.dense()[frozen] == 0).all()
    masked = GroupInt(  # feedback into frozen positions, then cut off, is worse
        torch.where(frozen, 0, run(weight, stats, bits=3, group=16, refine=0).codes).to(torch.int8),
        run(weight, stats, bits=3, group=16, refine=0).scale,
        None,
        3,
    )
    assert loss(weight, code, stats) < loss(weight, rounded, stats)
    assert asymmetric or loss(weight, code, stats) < loss(weight, masked, stats)


def test_drift_brings_the_outputs_nearer_to_the_dense_ones() -> None:
    gains = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weight, _ = problem(seed=seed)
        dense = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
        x = dense + 0.2 * dense.roll(1, 1) + torch.randn(600, 64, generator=generator)  # shrunk, mixed and noisy
        stats = InputStatistics(x.T @ x, 600)
        drift = (dense - x).T @ x
        aimed = gptq.solve(weight, stats, GptqSettings(bits=4, group=16), None, drift).code
        errors = [
            float((dense @ weight.T - x @ q.dense().T).square().sum()) for q in (run(weight, stats, group=16), aimed)
        ]
        gains.append(errors[1] / errors[0])
    assert max(gains) < 0.95


def test_the_aim_under_drift_is_the_least_squares_solution() -> None:
    weight, stats = problem()
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(64, 64, generator=generator) @ stats.hessian * 0.1
    order = torch.randperm(64, generator=generator)
    factor = InputStatistics(stats.hessian[order][:, order], 1).factor(0.01)
    A = (stats.hessian + stats.shift(0.01) * torch.eye(64)).double()
    expected = weight + (weight.double() @ drift.double() @ torch.linalg.inv(A)).float()
    assert torch.allclose(drift_target(weight, drift, factor.upper, order), expected, rtol=1e-3, atol=1e-3)


def test_grid_search_finds_the_best_of_its_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 5, generator=generator)
    importance = torch.rand(12, generator=generator)
    for asymmetric in (False, True):
        grids = candidate_grids(X, 3, asymmetric=asymmetric, clip=True)
        errors = grid_errors(X, grids, importance)
        for c, i in product(range(len(grids.scale)), range(5)):
            zero = 0.0 if grids.zero is None else float(grids.zero[c, i])
            levels = torch.tensor([(code - zero) * float(grids.scale[c, i]) for code in range(-4, 4)])
            slow = sum(float(importance[j]) * min(float(X[j, i] - level) ** 2 for level in levels) for j in range(12))
            assert abs(slow - float(errors[c, i])) < 1e-4
        best = best_grids(X, grids, 3, importance)
        assert torch.allclose(grid_errors(X, best, importance), errors.sort(0).values[:3])


def test_scales_may_be_negative_and_it_helps() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.5, -0.5]])
    code = nearest(weight, bits=2, group=4)
    assert (code.scale < 0).all() and torch.equal(code.dense(), weight)


def test_without_search_it_is_the_baseline_of_the_reports_up_to_the_scale() -> None:
    weight, _ = problem()
    ours, baseline = nearest(weight, bits=4, group=16, clip=False).dense(), round_to_nearest(weight, 4, 16)
    assert float((ours - baseline).abs().mean()) < 0.01 * float(weight.abs().mean())


@pytest.mark.parametrize("method", [run, lambda weight, stats, **settings: nearest(weight, **settings)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_awkward_groups(method: Callable[..., GroupInt], asymmetric: bool, bits: int) -> None:
    _, stats = problem(n=16)
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))
    weight[0] = 0
    weight[1] = 0.75
    weight[2] = -1e-3
    weight[3, 5] = 1e6
    weight[4] *= 1e-12
    weight[5, :8] = 0
    code = method(weight, stats, bits=bits, group=8, asymmetric=asymmetric)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        code.parts(dtype)
        assert torch.isfinite(code.dense(dtype)).all()
    dense = code.dense()
    assert (dense[0] == 0).all()
    assert method is run or (dense[1] - 0.75).abs().max() < 0.05
    assert dense[3, 5] == dense.abs().max() and dense[3, 5] >= 2**14  # as far as a scale reaches


def test_a_single_column_and_a_single_row() -> None:
    for m, n in ((5, 1), (1, 5), (1, 1)):
        weight, stats = problem(m=m, n=n)
        for code in (run(weight, stats), nearest(weight)):
            assert code.dense().shape == (m, n)
            assert (code.dense() - weight).abs().max() <= 0.2 * weight.abs().max()


def test_inputs_never_seen_are_rounded_like_the_others() -> None:
    weight, stats = problem()
    hessian = stats.hessian.clone()
    hessian[:, [3, 40]] = 0
    hessian[[3, 40]] = 0
    code = run(weight, InputStatistics(hessian, 1), bits=6, group=16)
    assert (code.dense() - weight)[:, [3, 40]].abs().max() < 0.1


def test_what_was_out_of_the_ordinary_is_told() -> None:
    weight, stats = problem(n=172)
    (note,) = gptq.solve(weight, stats, GptqSettings(group=128)).notes
    assert note == "groups of 128 do not divide 172 inputs: groups of 86"
    (note,) = round_nearest.solve(weight.masked_fill(weight > 2, 1e5), None, RtnSettings(group="row")).notes
    assert "beyond the reach" in note
    singular = InputStatistics(torch.ones(172, 172), 1)
    notes = gptq.solve(weight, singular, GptqSettings(group=43, damp=1e-9)).notes
    assert any("Hessian needed" in note for note in notes)


@pytest.mark.parametrize(
    ("group", "n", "width"),
    [(128, 4096, 128), (128, 64, 64), (128, 172, 86), (64, 172, 43), (32, 172, 43), (128, 139, 139), ("row", 172, 172)],
)
def test_groups_divide_what_they_are_for(group: Any, n: int, width: int) -> None:
    assert GptqSettings(group=group).width(n) == width


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_spec_is_foreseen(asymmetric: bool) -> None:
    weight, stats = problem(n=60)
    settings = GptqSettings(bits=3, group=16, asymmetric=asymmetric)
    code = gptq.solve(weight, stats, settings).code
    assert isinstance(code, GroupInt)
    foreseen = gptq.foresee(settings, (24, 60), "bfloat16")
    assert foreseen == code.spec(torch.bfloat16)
    parts = code.parts(torch.bfloat16)
    assert layout_group_int(foreseen) == {part: (tuple(t.shape), t.dtype) for part, t in parts.items()}


@pytest.mark.parametrize("shape", [(24, 64), (140, 160)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_same_bits_on_any_number_of_threads(
    shape: tuple[int, int], asymmetric: bool, on_threads: Callable[..., list[Any]]
) -> None:
    weight, stats = problem(*shape)
    kept = weight.clone(), stats.hessian.clone()
    settings = {"bits": 3, "group": 32, "asymmetric": asymmetric}
    one, two = on_threads(lambda: run(weight, InputStatistics(stats.hessian, 1), **settings))
    assert same(one, two)
    one, two = on_threads(lambda: nearest(weight, **settings))
    assert same(one, two)
    assert torch.equal(weight, kept[0]) and torch.equal(stats.hessian, kept[1])
