"""RMS norm of a few tokens on CPUs in one call: PyTorch takes eight, and most of their time is spent between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.matrix import DTYPES
from compressor.kernels.native import LEVELS, native

MOST = 1 << 17
"""Numbers, in all, up to which a call is made: PyTorch has several threads for more."""


@dataclass(frozen=True)
class Formula:
    """One of the ways in which models compute ``x / sqrt(mean(x^2) + eps) * weight`` along the last dimension, in fp32.

    Attributes:
        eps: what is added to the mean.
        more: whether the weight is one more than what is stored.
        rounded: whether the quotient is rounded to the dtype of ``x`` before it is multiplied.
    """

    eps: float
    more: bool
    rounded: bool


def can_normalize(x: Tensor, weight: Tensor) -> bool:
    """Return whether `rms_norm` takes these: on the CPU, without gradients, of one dtype, of a width that it knows."""
    if not (x.is_cpu and weight.is_cpu) or weight.dtype != x.dtype or x.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    n = weight.numel()
    return x.ndim > 0 and x.shape[-1] == n and n % 16 == 0 and 0 < x.numel() <= MOST and weight.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor, formula: Formula, level: str) -> Tensor:
    """Return the norm of every row.

    Args:
        x: (..., n), fp32, bf16 or fp16; see `can_normalize`.
        weight: (n,), of the same dtype.
        formula: how.
        level: instruction set.

    Raises:
        ValueError: something does not fit.
    """
    found = native()
    assert found is not None
    x = x.contiguous()
    n, out = x.shape[-1], torch.empty_like(x)
    found.module.norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // n, n, DTYPES[x.dtype], formula.eps, formula.more,
        formula.rounded, LEVELS.index(level),
    )  # fmt: skip
    return out
