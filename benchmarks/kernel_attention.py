"""Attention of one token, by PyTorch and by the kernels, after texts of several lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.kernel_matrices import rotation
from benchmarks.kernel_parts import Setup, levels
from benchmarks.kernel_timing import Contender, interleave
from compressor.kernels.attention import attention

TORCH_ATTENTION, OURS = "torch", "ours"
HEADS = ((32, 32, 64), (32, 8, 128), (14, 2, 64))
"""Heads, heads of keys, width: of Llama's first billions, of those of 8 billion, of Qwen's half a billion."""

CONTEXTS = (128, 512, 2048)


def attention_speed(s: Setup, heads: tuple[int, int, int], context: int, rounds: int) -> dict[str, Any]:
    """Times of one layer's attention in bf16, one thread; keys and values rotate through copies."""
    count, kv, width = heads
    pair = torch.randn(2, 1, kv, context, width).bfloat16()
    copies = rotation(pair, pair.nbytes, s.memory)
    q = torch.randn(1, count, 1, width).bfloat16()
    grouped = q.view(1, kv, count // kv, width)  # as transformers asks PyTorch

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(grouped, *next(copies))

    def ours(level: str) -> Contender:
        def work() -> Tensor:
            return attention(q, *next(copies), None, width**-0.5, level)

        return s.contender(OURS, work, pair.nbytes, level=level)

    rows = interleave([s.contender(TORCH_ATTENTION, theirs, pair.nbytes), *map(ours, levels())], rounds)
    return {"heads": list(heads), "context": context, "rows": rows}
