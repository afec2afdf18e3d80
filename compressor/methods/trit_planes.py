"""Trit planes (PTQTP, arXiv 2509.16989): W ~ sum_k a_k T_k, and a fit to what the layer does to its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.formats.trit_planes import TritPlanes
from compressor.methods.quantize_settings import TritPlanesSettings
from compressor.methods.result import Quantized
from compressor.methods.statistics import InputStatistics, damped
from compressor.methods.sweep import sweep
from compressor.methods.threads import matmul, submul_
from compressor.methods.trit_fit import many_starts, nearest_values, published
from compressor.methods.trit_levels import Levels
from compressor.methods.trit_search import GroupFit, descend_, refitted, search_group

CHUNK = 1 << 16
"""Weights that are fitted at once on their own."""


def foresee(settings: TritPlanesSettings, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Return the spec under which a weight of ``shape`` (m, n) will be stored."""
    return {
        "format": "trit-planes",
        "shape": list(shape),
        "dtype": dtype,
        "planes": settings.count,
        "group": settings.width(shape[1]),
    }


def solve(
    weight: Tensor, stats: InputStatistics | None, settings: TritPlanesSettings, frozen: Tensor | None = None
) -> Quantized:
    """Write ``weight`` (m, n) fp32 as a sum of trit planes; ``frozen`` weights are zero in all of them.

    ``fit="default"`` without ``stats`` is ``fit="data-free"``; the other fits do not look at ``stats``.

    Raises:
        FactorizationError: the Hessian cannot be factorized (``fit="default"``).
    """
    width = max(1, settings.width(weight.shape[1]))
    notes: tuple[str, ...] = ()
    W = weight.T if frozen is None else weight.T.masked_fill(frozen.T, 0)
    if settings.fit == "default" and stats is not None:
        fits, notes = _on_inputs(W.contiguous(), stats, settings, width, None if frozen is None else frozen.T)
    else:
        fits = _on_weights(W.contiguous(), settings, width)
        if settings.fit == "default":
            notes = ("no usable input statistics: trit planes fitted to the weights alone",)
    return Quantized(_stored(fits, width), notes)


def _on_weights(W: Tensor, settings: TritPlanesSettings, width: int) -> list[GroupFit]:
    """Fit the groups of ``W`` (n, m) on their own, by ``fit="paper"`` or from many starts."""
    fits = []
    for columns in torch.split(W, width):
        parts = []
        for X in torch.split(columns, max(1, CHUNK // len(columns)), dim=1):
            if settings.fit == "paper":
                scale = published(X, settings.count)
            else:
                scale = many_starts(X, torch.ones_like(X[:, :1]), settings.count, finalists=1)[:, 0]
            parts.append(GroupFit(scale, nearest_values(X, scale)))
        fits.append(_joined(parts))
    return fits


def _on_inputs(
    W: Tensor, stats: InputStatistics, settings: TritPlanesSettings, width: int, frozen: Tensor | None
) -> tuple[list[GroupFit], tuple[str, ...]]:
    """Fit the groups of ``W`` (n, m) one after another with error feedback, then again and again by descent."""
    factor = stats.factor(settings.damp)
    U = factor.upper
    W = W.masked_fill(factor.dead[:, None], 0)
    fits: list[GroupFit] = []

    def decide(start: int, columns: Tensor) -> None:
        end = start + len(columns)
        still = None if frozen is None else frozen[start:end]
        fits.append(search_group(columns, U[start:end, start:end], settings.count, still))

    sweep(W.T, U, decide=decide, span=width, snap=lambda j, w: fits[-1].value[j % width], block=settings.block)
    H = damped(stats.hessian, factor.damp)
    fits = _descent(W, fits, H, settings.rounds, frozen)
    return fits, (f"the Hessian needed: {', '.join(factor.rungs)}",) if factor.rungs else ()


def _descent(W: Tensor, fits: list[GroupFit], H: Tensor, rounds: int, frozen: Tensor | None) -> list[GroupFit]:
    """Refit the scales of group after group and move its trits, everything else fixed, under ``H`` (n, n).

    No step makes a row's loss (w - q) H (w - q)^T larger.
    """
    fits = list(fits)
    gradient = matmul(H, W - torch.cat([fit.value for fit in fits]))
    for _ in range(rounds):
        start = 0
        for i, fit in enumerate(fits):
            end = start + len(fit.value)
            own, S = gradient[start:end], H[start:end, start:end]
            still = None if frozen is None else frozen[start:end]
            fits[i] = _better(fit, own.clone(), S, still)
            step = fits[i].value - fit.value
            submul_(gradient, H[:, start:end], step)
            start = end
    return fits


def _better(fit: GroupFit, gradient: Tensor, S: Tensor, frozen: Tensor | None) -> GroupFit:
    """One round for one group; ``gradient`` (c, m) is S (x - q), and overwritten."""
    levels = Levels.of(fit.scale)
    index = levels.nearest_all(fit.value)
    fresh, fresh_index = refitted(levels, index, S, gradient + matmul(S, fit.value))
    fresh_value = fresh.value.gather(0, fresh_index)
    step = fresh_value - fit.value
    pushed = matmul(S, step)
    gain = (step * (2 * gradient - pushed)).sum(0)
    better = gain > 0
    scale = torch.where(better, fresh.scale, fit.scale)
    value = torch.where(better, fresh_value, fit.value)
    gradient -= pushed * better
    descend_(gradient, value, S, Levels.of(scale), frozen)
    return GroupFit(scale, value)


def _joined(parts: list[GroupFit]) -> GroupFit:
    return GroupFit(torch.cat([part.scale for part in parts], dim=1), torch.cat([part.value for part in parts], dim=1))


def _stored(fits: list[GroupFit], width: int) -> TritPlanes:
    """Return the planes whose values the fits have."""
    trits = []
    for fit in fits:
        levels = Levels.of(fit.scale)
        trits.append(torch.stack(levels.planes(levels.nearest_all(fit.value))).to(torch.int8))
    scale = torch.stack([fit.scale for fit in fits], dim=-1).half()
    return TritPlanes(torch.cat(trits, dim=1).transpose(1, 2).contiguous(), scale, width)
