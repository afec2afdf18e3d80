"""Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from compressor.methods import masks
from compressor.methods.magnitude import target, without_data, zeroed
from compressor.methods.refit import refit_if_asked
from compressor.methods.result import Pruned
from compressor.methods.settings import WandaSettings
from compressor.methods.statistics import InputStatistics


def solve(
    weight: Tensor,
    stats: InputStatistics | None,
    settings: WandaSettings,
    sparsity: float | None,
    frozen: Tensor | None = None,
) -> Pruned:
    """Zero the smallest |w_ij| ||x_j|| of every row (eq. 1), or of every N:M group of a row; the rest stays as it is.

    ``weight`` (m, n) fp32. The count per row is the nearest integer to ``sparsity * n``. Without ``stats``, magnitude.
    """
    if stats is None:
        return without_data(weight, settings, sparsity, frozen, "wanda")
    score = weight.abs() * stats.norms()
    if settings.group is not None:
        mask = masks.keep_pattern(score, weight, *settings.group, frozen)
    else:
        mask = masks.keep_rows(score, weight, masks.count(target(sparsity, settings), weight.shape[1]), frozen)
    return refit_if_asked(Pruned(zeroed(weight, mask, frozen), mask), weight, stats, settings, frozen)
