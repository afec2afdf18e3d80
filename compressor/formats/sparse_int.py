"""A bitmask, and the kept entries as b-bit codes on one affine grid a row: pruning and quantization in one matrix.

value = (code - zero) * scale, in fp32, then cast to the spec's dtype
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.formats.bitmask import bitmask_kept
from compressor.formats.bits import pack_bits, pack_codes, unpack_codes
from compressor.formats.parts import Layout, Spec, check_mask, check_parts, matrix_shape, parse_dtype


def pack_sparse_int(codes: Tensor, scale: Tensor, zero: Tensor, mask: Tensor, bits: int) -> dict[str, Tensor]:
    """Pack the kept codes.

    Args:
        codes: (m, n) uint8, below ``2**bits`` where kept; elsewhere ignored.
        scale: (m,) fp16.
        zero: (m,) uint8, the code of the value 0.
        mask: (m, n) bool, True = kept.
        bits: 2 to 8.

    Returns:
        ``mask`` uint8 (ceil(mn / 8),), ``codes`` uint8 (ceil(nnz * bits / 8),), and ``scale`` and ``zero`` as given.

    Raises:
        ValueError: an argument of another shape or dtype, or a code that does not fit.
    """
    check_mask(codes, mask)
    _check_bits(bits)
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, codes.shape),
        ("scale", scale, torch.float16, codes.shape[:1]),
        ("zero", zero, torch.uint8, codes.shape[:1]),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    packed = pack_codes(torch.masked_select(codes, mask), bits)
    return {"mask": pack_bits(mask), "codes": packed, "scale": scale, "zero": zero}


def unpack_sparse_int(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    codes, scale, zero, mask = sparse_int_codes(parts, spec)
    return grid_values(codes, scale, zero, mask, parse_dtype(spec["dtype"]))


def sparse_int_codes(parts: Mapping[str, Tensor], spec: Spec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (codes (m, n) uint8, zero where not kept; scale (m,) fp16; zero (m,) uint8; mask (m, n) bool)."""
    check_parts(parts, layout_sparse_int(spec), "sparse-int")
    mask = bitmask_kept(parts, spec)
    kept = unpack_codes(parts["codes"], spec["bits"], spec["nnz"])
    codes = kept.new_zeros(matrix_shape(spec)).masked_scatter_(mask, kept)
    return codes, parts["scale"], parts["zero"], mask


def grid_values(codes: Tensor, scale: Tensor, zero: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values (m, n) of the codes in ``dtype``, +0 outside ``mask``; shapes as in :func:`pack_sparse_int`."""
    weight = torch.zeros(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, (1 << 22) // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], rows):
        part = slice(start, start + rows)
        value = (codes[part].float() - zero[part, None].float()) * scale[part, None].float()
        weight[part] = value.masked_fill_(~mask[part], 0).to(dtype)
    return weight


def layout_sparse_int(spec: Spec) -> Layout:
    """Return the shapes of ``mask``, ``codes``, ``scale`` and ``zero``."""
    m, n = matrix_shape(spec)
    _check_bits(spec["bits"])
    parse_dtype(spec["dtype"])
    return {
        "mask": ((-(-m * n // 8),), torch.uint8),
        "codes": ((-(-spec["nnz"] * spec["bits"] // 8),), torch.uint8),
        "scale": ((m,), torch.float16),
        "zero": ((m,), torch.uint8),
    }


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits: expected 2 to 8")
