"""OWL: blocks with more outliers keep more (Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

FLOOR, CEILING = 0.001, 0.999


def outlier_score(weight: Tensor, column_norms: Tensor, threshold: float = 5.0) -> float:
    """Return the fraction of |w_ij| ||x_j|| that is above ``threshold`` times its mean over the matrix (section 3).

    ``weight`` (m, n), ``column_norms`` (n,), see `InputStatistics.norms`. The score of a block is the mean over its
    matrices, weighted by their size.
    """
    score = weight.float().abs() * column_norms
    mean = math.fsum(score.sum(1).double().tolist()) / score.numel()
    above = (score > threshold * mean).sum(1).tolist()
    return float(sum(above)) / score.numel()


def allocate(scores: Sequence[float], sparsity: float, band: float, sizes: Sequence[int] | None = None) -> list[float]:
    """Return one sparsity per block, less where the score is high; the mean weighted by ``sizes`` is ``sparsity``.

    Scores are stretched linearly to a range of 2 * ``band``. Values are kept within [0.001, 0.999], and shifted
    together until the mean fits. Equal scores give the target everywhere.

    Args:
        scores: of each block, see `outlier_score`.
        sparsity: the target, in (0, 1).
        band: half the range, lambda in the paper.
        sizes: parameters of each block; equal when None.
    """
    weights = [1] * len(scores) if sizes is None else list(sizes)
    if len(weights) != len(scores):
        raise ValueError(f"{len(scores)} scores, but {len(weights)} sizes")
    if not scores:
        return []
    low, high = min(scores), max(scores)
    if high == low:
        return [sparsity] * len(scores)
    offsets = [-2 * band * (score - low) / (high - low) for score in scores]

    def shifted(by: float) -> list[float]:
        return [min(max(offset + by, FLOOR), CEILING) for offset in offsets]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    below, above = 0.0, 1.0 + 2 * band
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if mean(shifted(middle)) < sparsity else (below, middle)
    return shifted(above)
