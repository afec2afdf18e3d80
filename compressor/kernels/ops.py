"""The native product and attention as operators of PyTorch: ``torch.compile`` and ``torch.export`` see one node.

Eager calls do not come here: dispatching an operator takes longer than a small product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.attention import eager_attention
from compressor.kernels.matrix import Kind, Matrix
from compressor.kernels.native import LEVELS

NAME = "compressor::native_linear"


@torch.library.custom_op(NAME, mutates_args=())
def native_linear(
    x: Tensor, data: Tensor, extra: Tensor | None, bias: Tensor | None, kind: int, m: int, kb: int, factor: float,
    level: int, exact: bool,
) -> Tensor:  # fmt: skip
    """Return ``x W^T + bias`` (tokens, m) for x (tokens, n); the rest as in `Matrix` and `Matrix.product`."""
    matrix = Matrix(Kind(kind), m, x.shape[1], kb, factor, data, extra)
    return matrix.eager_product(x, bias, LEVELS[level], exact)


@native_linear.register_fake
def _(
    x: Tensor, data: Tensor, extra: Tensor | None, bias: Tensor | None, kind: int, m: int, kb: int, factor: float,
    level: int, exact: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], m)


def traced_product(matrix: Matrix, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
    """As `Matrix.product`, as one node of a graph."""
    kind, number = int(matrix.kind), LEVELS.index(level)
    found: Tensor = native_linear(
        x, matrix.data, matrix.extra, bias, kind, matrix.m, matrix.kb, matrix.factor, number, exact
    )
    return found


@torch.library.custom_op("compressor::native_attention", mutates_args=())
def native_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, level: int) -> Tensor:
    """As `compressor.kernels.attention.attention`, as one node of a graph; the level by its number."""
    return eager_attention(q, k, v, mask, scale, LEVELS[level])


@native_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, level: int) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])
