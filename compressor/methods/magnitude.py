"""Magnitude pruning, the data-free baseline: the smallest |w| of a matrix go."""

from __future__ import annotations

from torch import Tensor

from compressor.methods import masks
from compressor.methods.refit import refit_if_asked
from compressor.methods.result import Pruned
from compressor.methods.settings import MagnitudeSettings, PruneSettings
from compressor.methods.statistics import InputStatistics


def solve(
    weight: Tensor,
    stats: InputStatistics | None,
    settings: MagnitudeSettings,
    sparsity: float | None,
    frozen: Tensor | None = None,
) -> Pruned:
    """Zero the smallest |w| of ``weight`` (m, n) fp32, or of every N:M group; ties go by position, row by row.

    ``stats`` is used by the refit only.
    """
    return refit_if_asked(by_magnitude(weight, settings, sparsity, frozen), weight, stats, settings, frozen)


def by_magnitude(weight: Tensor, settings: PruneSettings, sparsity: float | None, frozen: Tensor | None) -> Pruned:
    """Prune without data, whatever the method of ``settings``."""
    score = weight.abs()
    if settings.group is not None:
        mask = masks.keep_pattern(score, weight, *settings.group, frozen)
    else:
        mask = masks.keep_exactly(score, weight, masks.count(target(sparsity, settings), weight.numel()), frozen)
    return Pruned(zeroed(weight, mask, frozen), mask)


def without_data(
    weight: Tensor, settings: PruneSettings, sparsity: float | None, frozen: Tensor | None, method: str
) -> Pruned:
    """What a method that needs data does where there is none: prune by magnitude, and say so."""
    pruned = by_magnitude(weight, settings, sparsity, frozen)
    note = f"no usable input statistics: pruned by magnitude instead of {method}"
    return Pruned(pruned.weight, pruned.mask, notes=(note,))


def zeroed(weight: Tensor, mask: Tensor, frozen: Tensor | None) -> Tensor:
    """Return ``weight`` with +0.0, bit for bit, outside ``mask`` and at ``frozen`` positions (all (m, n))."""
    return weight.masked_fill(~mask if frozen is None else ~mask | frozen, 0)


def target(sparsity: float | None, settings: PruneSettings) -> float:
    """The sparsity of this matrix: the allocated one, or the settings' own."""
    chosen = settings.sparsity if sparsity is None else sparsity
    if chosen is None:
        raise ValueError("a sparsity is needed where the settings name no pattern")
    return chosen
