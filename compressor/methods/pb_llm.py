"""Partial binarization (PB-LLM, Shang et al., arXiv 2310.00034): salient weights as integers, of the others one sign.

``fit="paper"`` is the published GPTQ-PB with the defects of its code: means and scales are taken over all weights of a
group, those that are salient counted as zeros; the mask is that of the original weights; nothing is fitted to the
inputs but by the feedback of the sweep. (There sign(0) is 0, a third level; here plus, since one bit has no third.)

The default starts from a sweep whose means and scales are those of the binarized weights and whose mask is made from
the updated ones, and then takes turns under the Hessian (`binary_search`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.formats.mask_codes import foreseen_mask
from compressor.formats.partial_binary import PartialBinary
from compressor.methods import binary_start
from compressor.methods.binary_fit import Rows, group_sums, spread
from compressor.methods.binary_search import SalientGrids, half, search_, settle_
from compressor.methods.int_grid import IntGrid, candidate_grids
from compressor.methods.masks import count
from compressor.methods.quantize_settings import PbLlmSettings
from compressor.methods.result import Quantized
from compressor.methods.statistics import InputStatistics, damped
from compressor.methods.sweep import sweep


def foresee(settings: PbLlmSettings, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Return the spec under which a weight of ``shape`` (m, n) will be stored; the bytes of a mask are estimated."""
    m, n = shape
    by_input = settings.mask == "column"
    if by_input:
        inputs = count(settings.share, n)
        mask = {"nnz": m * inputs, "mask": {0: "none", n: "all"}.get(inputs, "inputs")}
    else:
        mask = foreseen_mask(m, n, count(settings.share, m * n))
    return {
        "format": "partial-binary",
        "shape": [m, n],
        "dtype": dtype,
        "group": settings.width(n),
        "mean": settings.means or settings.fit == "paper",
        "bits": settings.bits,
        "zero": settings.fit == "paper",
        "by_input": by_input and settings.fit == "default",
        **mask,
    }


def solve(
    weight: Tensor, stats: InputStatistics | None, settings: PbLlmSettings, frozen: Tensor | None = None
) -> Quantized:
    """Write ``weight`` (m, n) fp32 as signs and a few integers; without ``stats`` by the weights alone.

    ``frozen`` weights do not stay zero, since a sign cannot say it.

    Raises:
        FactorizationError: the Hessian cannot be factorized.
    """
    notes: tuple[str, ...] = ()
    if frozen is not None and bool(frozen.any()):
        notes = (f"{int(frozen.sum())} weights that were pruned are signs now, which cannot say zero",)
    if stats is None:
        notes += ("no usable input statistics: binarized by the weights alone",)
    elif rungs := stats.factor(settings.damp).rungs:
        notes += (f"the Hessian needed: {', '.join(rungs)}",)
    if settings.fit == "paper":
        return Quantized(_published(weight, stats, settings), notes)
    return Quantized(_fitted(weight, stats, settings), notes)


def _fitted(weight: Tensor, stats: InputStatistics | None, settings: PbLlmSettings) -> PartialBinary:
    m, n = weight.shape
    group, by_input = max(1, settings.width(n)), settings.mask == "column"
    A = None
    if stats is None:
        rows = binary_start.alone(weight, salient=settings.share, group=group, by_input=by_input, means=settings.means)
    else:
        factor = stats.factor(settings.damp)
        A = damped(stats.hessian, factor.damp)
        W = weight.masked_fill(factor.dead, 0)
        hessian, block = settings.metric == "hessian", settings.block
        how: dict[str, Any] = {"salient": settings.share, "group": group, "hessian": hessian, "block": block}
        how["means"] = settings.means
        rows = binary_start.by_inputs(W, A, **how) if by_input else binary_start.swept(W, factor.upper, **how)
        number = count(settings.share, m * n) if hessian and not by_input else None
        search_(rows, A, number=number, bits=settings.bits, rounds=settings.rounds, block=block)
    return _stored(rows, settle_(rows, A, bits=settings.bits, block=settings.block, by_input=by_input))


def _stored(rows: Rows, grids: SalientGrids) -> PartialBinary:
    """Return the code whose value ``rows`` have."""
    bits = grids.grid.bits
    codes = (grids.offsets(rows.value) + 2 ** (bits - 1)).masked_fill_(~rows.salient, 0)
    step = grids.step().half()
    return PartialBinary(
        signs=(rows.plus & ~rows.salient).T.contiguous(),
        scale=rows.scale.T.half().contiguous(),
        mean=rows.mean.T.half().contiguous() if rows.means else None,
        salient=rows.salient.T.contiguous(),
        codes=codes.T.to(torch.uint8).contiguous(),
        step=step.masked_fill(~rows.salient.any(1, keepdim=True), 0).T if grids.by_input else step.T,
        zero=None,
        bits=bits,
        group=rows.group,
    )


def _published(weight: Tensor, stats: InputStatistics | None, settings: PbLlmSettings) -> PartialBinary:
    """GPTQ-PB (section 3.3 of the paper, and what its code does); without ``stats`` there is no feedback."""
    m, n = weight.shape
    group = max(1, settings.width(n))
    W, upper = weight, torch.eye(n, device=weight.device)
    if stats is not None:
        factor = stats.factor(settings.damp)
        W, upper = weight.masked_fill(factor.dead, 0), factor.upper
    low = _published_low(W, upper.diagonal(), settings, group)
    X = (W * low).T
    # Divided by all inputs of the group, though only those of `low` are in the sums.
    sizes = group_sums(torch.ones_like(X[:, :1]), group)
    mean = half(group_sums(X, group) / sizes)
    scale = half(group_sums((X - spread(group_sums(X, group) / sizes, group, n)).abs(), group) / sizes)
    grid: IntGrid = candidate_grids(W.T, settings.bits, asymmetric=True, clip=False)[0]
    assert grid.zero is not None
    signs = torch.zeros(n, m, dtype=torch.bool, device=W.device)
    offsets = torch.zeros(n, m, device=W.device)

    def snap(j: int, w: Tensor) -> Tensor:
        signs[j], offsets[j] = w >= mean[j // group], grid.offsets(w)
        near = torch.where(signs[j], scale[j // group], -scale[j // group]) + mean[j // group]
        return torch.where(low[:, j], near, offsets[j] * grid.scale)

    sweep(W, upper, snap=snap, block=settings.block)
    top = 2 ** (settings.bits - 1)
    codes = (offsets + grid.zero + top).T.masked_fill(low, 0).to(torch.uint8)
    return PartialBinary(
        signs=(signs.T & low).contiguous(),
        scale=scale.T.half().contiguous(),
        mean=mean.T.half().contiguous(),
        salient=~low,
        codes=codes.contiguous(),
        step=grid.scale[:, None].half(),
        zero=(grid.zero + top).to(torch.uint8),
        bits=settings.bits,
        group=group,
    )


def _published_low(W: Tensor, diagonal: Tensor, settings: PbLlmSettings, group: int) -> Tensor:
    """Return which weights of ``W`` (m, n) become signs, (m, n) bool: in each group those with no more than the score
    at the share of its sorted scores; |w|, or w^2 / U_jj^2 of the original weights."""
    low = torch.empty_like(W, dtype=torch.bool)
    for start in range(0, W.shape[1], group):
        part = slice(start, start + group)
        score = W[:, part].abs() if settings.metric == "magnitude" else (W[:, part] / diagonal[part]).square()
        if settings.mask == "column":
            score = score.sum(0, keepdim=True)
        place = min(int(score.numel() * (1 - settings.share)), score.numel() - 1)
        low[:, part] = score <= score.flatten().sort().values[place]
    return low
