"""Attention of one token with all before it, on CPUs: keys and values are read once, at the speed of memory.

PyTorch's takes several times as long for a single token, so that after a few hundred of them a model with fast layers
would mostly wait for it. Prompts, gradients and other devices are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.matrix import DTYPES
from compressor.kernels.native import LEVELS, native

WIDEST = 512
"""Numbers of a key or a value of one head, at most; they are a multiple of 16."""


def can_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether `attention` takes these: one token, on the CPU, without gradients, in shapes that it knows."""
    if q.shape[2] != 1 or q.device.type != "cpu" or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    widths, keys = (q.shape[3], v.shape[3]), k.shape[2]
    if any(width % 16 or not 0 < width <= WIDEST for width in widths) or q.shape[1] % k.shape[1] or not keys:
        return False
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return False
    return mask is None or (
        mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[2] == 1 and mask.shape[3] == keys
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, level: str) -> Tensor:
    """Return softmax(scale q k^T) v of one token; scores, weights and sums are in fp32.

    Args:
        q: (batch, heads, 1, d) fp32, bf16 or fp16; the numbers of a vector lie side by side, as in all.
        k, v: (batch, heads of keys, keys, d) and (batch, heads of keys, keys, dv), of the same dtype. Heads beside each
            other share one.
        mask: bool (batch or 1, heads or 1, 1, keys), the keys that count; None: all. Without any the outputs are zeros.
        scale: of the scores.
        level: instruction set.

    Returns:
        (batch, 1, heads, dv) in the dtype of ``q``.

    Raises:
        ValueError: something does not fit.
    """
    if torch.compiler.is_compiling():
        from compressor.kernels.ops import native_attention

        traced: Tensor = native_attention(q, k, v, mask, scale, LEVELS.index(level))
        return traced
    return eager_attention(q, k, v, mask, scale, level)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, level: str) -> Tensor:
    """As `attention`, outside of graphs."""
    found = native()
    assert found is not None
    (batch, heads, _, d), (_, kv_heads, keys, dv) = q.shape, v.shape
    out = torch.empty(batch, 1, heads, dv, dtype=q.dtype)
    looked_at: tuple[int, ...] = (0, 0)
    steps = [0, 0, 0]
    if mask is not None:
        looked_at = _held(mask)
        steps = [mask.stride(place) if mask.shape[place] > 1 else 0 for place in (0, 1, 3)]
    found.module.attention(
        *_held(q), *_held(k), *_held(v), *looked_at, out.data_ptr(), DTYPES[q.dtype], batch, heads, kv_heads, keys, d,
        dv, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *steps, scale, torch.get_num_threads(),
        LEVELS.index(level),
    )  # fmt: skip
    return out


def _held(x: Tensor) -> tuple[int, int]:
    """Where a tensor begins, and how many numbers may be read from there on."""
    return x.data_ptr(), int(x.untyped_storage().nbytes()) // x.itemsize - int(x.storage_offset())
