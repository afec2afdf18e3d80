# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""Activations to int8, one scale for every token and 128 inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_kernel(
    x, codes, scales, sums, n, stride, chunks,
    CHUNKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: a token, ``CHUNKS`` times 128 inputs.

    x (tokens, n) any float; codes int8 (tokens, 128 chunks), 0 beyond n; scales fp32 (tokens, chunks); sums int32
    (tokens, 128 chunks / SPAN): of the codes. A chunk with a value that is not finite gets NaN for its scale, so that
    all outputs of that token, and of no other, are NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    inputs = chunk[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + token * stride + inputs, mask=inputs < n, other=0.0).to(tl.float32)
    size = tl.abs(value)
    bad = tl.max((~(size < float("inf"))).to(tl.int32), axis=1)
    most = tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)
    inverse = tl.where(most > 1e-30, 127.0 / most, 0.0)  # smaller ones are zeros: their reciprocal would overflow
    scaled = tl.where(size < float("inf"), value, 0.0) * inverse[:, None]
    code = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: the sum has no room for a fraction
    valid = chunk < chunks
    tl.store(codes + token * chunks * 128 + inputs, code.to(tl.int8), mask=valid[:, None])
    scale = tl.where(bad > 0, float("nan"), tl.where(most > 1e-30, most / 127.0, 0.0))
    tl.store(scales + token * chunks + chunk, scale, mask=valid)
    spans: tl.constexpr = 128 // SPAN
    total = tl.sum(tl.reshape(code, [CHUNKS, spans, SPAN]), axis=2)
    where = chunk[:, None] * spans + tl.arange(0, spans)[None, :]
    tl.store(sums + token * chunks * spans + where, total, mask=valid[:, None])
