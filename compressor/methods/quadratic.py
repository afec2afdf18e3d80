"""The layer-wise quadratic loss, tr((W - Q) H (W - Q)^T): what the error at a linear's output adds up to."""

from __future__ import annotations

import math

from torch import Tensor

from compressor.methods.threads import matmul


def row_losses(delta: Tensor, hessian: Tensor) -> Tensor:
    """Return d H d^T for every row d of ``delta`` (m, n): (m,) fp32. The same bits on any number of threads."""
    return (matmul(delta, hessian) * delta).sum(1)


def layer_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> tuple[float, float]:
    """Return tr((W - Q) H (W - Q)^T), and this divided by tr(W H W^T).

    ``weight`` and ``pruned`` (m, n), ``hessian`` (n, n), all fp32; H is a sum over tokens, so the first is the squared
    output error summed over tokens. The second is 0 where W gives no output and Q none either, else infinite.
    """
    absolute = _sum(row_losses(weight - pruned, hessian))
    whole = _sum(row_losses(weight, hessian))
    if whole > 0:
        return absolute, absolute / whole
    return absolute, 0.0 if absolute == 0 else math.inf


def _sum(rows: Tensor) -> float:
    """Exact sum; a row's rounding below zero counts as zero."""
    return math.fsum(rows.double().clamp(min=0).tolist())
