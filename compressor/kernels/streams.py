"""Masks and what they mark, to streams of rows, as native/layout.hpp describes."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.matrix import Kind, Matrix, room
from compressor.kernels.native import native
from compressor.kernels.records import ROWS, sign_tails

SLACK = 64
"""Bytes behind a stream that kernels may read."""

SPARSE_16 = {torch.bfloat16: Kind.SPARSE_BF16, torch.float16: Kind.SPARSE_FP16}


def _stream(kind: Kind, marked: Tensor, values: Tensor, signs: Tensor | None, tails: Tensor | None,
            heads: Tensor | None) -> Matrix:  # fmt: skip
    found = native()
    assert found is not None
    m, n = marked.shape
    pieces = [marked.contiguous().view(torch.uint8), values.contiguous(), signs, tails, heads]
    addresses = [0 if piece is None else piece.data_ptr() for piece in pieces]
    starts = torch.empty(-(-m // ROWS) + 1, dtype=torch.int64)
    call = (kind, m, n, 128, *addresses, starts.data_ptr())
    found.module.pack_rows(*call, 0, 0, torch.get_num_threads())
    data = room(int(starts[-1]) + SLACK)
    data[-SLACK:] = 0
    found.module.pack_rows(*call, data.data_ptr(), data.numel(), torch.get_num_threads())
    return Matrix(kind, m, n, 128, 1.0, data, starts)


def _heads(step: Tensor, zero: Tensor) -> Tensor:
    """Grids of rows, (m,) fp32 each, as uint8 (tiles, 128)."""
    rows = torch.stack([torch.nn.functional.pad(part.float(), (0, -len(part) % ROWS)) for part in (step, zero)], -1)
    return rows.view(-1, ROWS, 2).transpose(1, 2).contiguous().view(torch.uint8)


def partial_stream(
    signs: Tensor, scale: Tensor, mean: Tensor | None, group: int, salient: Tensor, codes: Tensor, step: Tensor,
    zero: Tensor,
) -> Matrix:  # fmt: skip
    """Signs (m, n) bool with scales and means (m, G) fp16; codes (m, n) uint8 where ``salient``, on a grid a row.

    ``group`` is a multiple of 128, or all inputs share a scale.
    """
    tails = sign_tails(scale, mean, 128, group, signs.shape[1])
    plain = signs.contiguous().view(torch.uint8)
    return _stream(Kind.PARTIAL, salient, codes, plain, tails, _heads(step, zero))


def sparse_codes_stream(codes: Tensor, mask: Tensor, step: Tensor, zero: Tensor) -> Matrix:
    """Codes (m, n) uint8 where ``mask``, on a grid a row; 0 elsewhere."""
    return _stream(Kind.SPARSE8, mask, codes, None, None, _heads(step, zero))


def sparse_stream(weight: Tensor, mask: Tensor) -> Matrix:
    """Numbers (m, n) bf16 or fp16 where ``mask``; 0 elsewhere."""
    return _stream(SPARSE_16[weight.dtype], mask, weight, None, None, None)
