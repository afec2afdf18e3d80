"""Choosing what to prune: exactly k, with ties broken by a documented rule.

Everywhere the order is (score, |weight|, position): of two equal scores the smaller |weight| goes first, of two equal
weights the one at the lower position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressor.errors import UserError

FEW = 16  # rows whose ties are settled one by one


def count(sparsity: float, total: int) -> int:
    """Return how many of ``total`` weights go at this ``sparsity``: the nearest integer, halves upwards."""
    return math.floor(sparsity * total + 0.5)


def tile_counts(pruned: int, free: Sequence[int]) -> list[int]:
    """Share ``pruned`` weights over tiles with ``free`` candidates each, proportionally; the sum is exact.

    Rounding remainders are carried from tile to tile, so each count is within one of its share.
    """
    total, before, out = sum(free), 0, []
    seen = 0
    for size in free:
        seen += size
        until = pruned * seen // total if total else 0
        out.append(until - before)
        before = until
    return out


def smallest(score: Tensor, magnitude: Tensor, k: int) -> Tensor:
    """Return (rows, n) bool, True for exactly the ``k`` smallest of each row of ``score`` (rows, n), no NaN.

    ``magnitude`` (rows, n) breaks ties, then the position in the row.
    """
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if k >= score.shape[1]:
        return torch.ones_like(score, dtype=torch.bool)
    return _by_partition(score, magnitude, k) if score.device.type == "cpu" else _by_sort(score, magnitude, k)


def _by_sort(score: Tensor, magnitude: Tensor, k: int) -> Tensor:
    """Two stable sorts, the lesser key first: no wait for the device."""
    order = magnitude.argsort(dim=1, stable=True)
    order = order.gather(1, score.gather(1, order).argsort(dim=1, stable=True))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :k], True)


def _by_partition(score: Tensor, magnitude: Tensor, k: int) -> Tensor:
    """The k-th smallest value by introselect (numpy's has ten times torch.kthvalue's speed), then its ties alone."""
    kth = torch.from_numpy(np.partition(score.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    chosen = score <= kth
    surplus = chosen.sum(1) - k
    tied = surplus.nonzero().flatten()
    if len(tied) > FEW:
        chosen[tied] = _by_sort(score[tied], magnitude[tied], k)
        return chosen
    for row in tied.tolist():
        ties = (score[row] == kth[row]).nonzero().flatten()
        order = ties[magnitude[row, ties].argsort(stable=True)]
        chosen[row, order[len(order) - int(surplus[row]) :]] = False
    return chosen


def keep_exactly(score: Tensor, weight: Tensor, pruned: int, frozen: Tensor | None) -> Tensor:
    """Return the mask (m, n) that drops ``pruned`` weights of the whole matrix, all of ``frozen`` among them."""
    if frozen is not None:
        score = score.masked_fill(frozen, -math.inf)
    drop = smallest(score.reshape(1, -1), weight.abs().reshape(1, -1), pruned).view_as(score)
    return ~drop if frozen is None else ~(drop | frozen)


def keep_rows(score: Tensor, weight: Tensor, pruned: int, frozen: Tensor | None) -> Tensor:
    """Return the mask (m, n) that drops ``pruned`` weights of every row, all of ``frozen`` among them."""
    if frozen is not None:
        score = score.masked_fill(frozen, -math.inf)
    drop = smallest(score, weight.abs(), pruned)
    return ~drop if frozen is None else ~(drop | frozen)


def keep_pattern(score: Tensor, weight: Tensor, kept: int, group: int, frozen: Tensor | None = None) -> Tensor:
    """Return the N:M mask (m, n): exactly ``kept`` of every ``group`` consecutive inputs of a row.

    Frozen weights go first; where a group has more of them than it drops, the mask still says ``kept``, because the
    packed formats count on it, and those weights are zero.

    Raises:
        UserError: ``group`` does not divide n.
    """
    check_divides(score.shape[1], kept, group)
    if frozen is not None:
        score = score.masked_fill(frozen, -math.inf)
    drop = smallest(score.reshape(-1, group), weight.abs().reshape(-1, group), group - kept)
    return ~drop.view_as(score)


def check_divides(n: int, kept: int, group: int) -> None:
    """Raise UserError unless ``group`` divides the number of inputs ``n``."""
    if n % group:
        raise UserError(
            f"pattern {kept}:{group} does not divide a weight with {n} inputs",
            fix="choose a pattern that does, or leave the module out with --exclude",
        )
