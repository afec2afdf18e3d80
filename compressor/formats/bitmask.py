"""One bit an entry says whether it is kept; the kept entries follow in row-major order.

Lossless for any mask, and bit-exact: a kept entry may be 0, -0, infinite or NaN. Everything else comes back as +0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.formats.bits import pack_bits, unpack_bits
from compressor.formats.parts import Layout, Spec, check_mask, check_parts, matrix_shape, parse_dtype


def pack_bitmask(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Pack the kept entries of ``weight``.

    Args:
        weight: (m, n), any dtype of ``WEIGHT_DTYPES``.
        mask: (m, n) bool, True = kept.

    Returns:
        ``mask`` uint8 (ceil(mn / 8),), padded only at the end; ``values`` (nnz,) in the dtype of ``weight``.
    """
    check_mask(weight, mask)
    return {"mask": pack_bits(mask), "values": torch.masked_select(weight, mask)}


def unpack_bitmask(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    check_parts(parts, layout_bitmask(spec), "bitmask")
    values = parts["values"]
    weight = values.new_zeros(matrix_shape(spec))
    return weight.masked_scatter_(bitmask_kept(parts, spec), values)


def bitmask_kept(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the mask (m, n) bool. ValueError when it does not hold ``spec["nnz"]`` entries."""
    m, n = matrix_shape(spec)
    mask = unpack_bits(parts["mask"], m * n).view(m, n)
    if (kept := int(torch.count_nonzero(mask))) != spec["nnz"]:
        raise ValueError(f"part 'mask' keeps {kept} entries, expected {spec['nnz']}")
    return mask


def layout_bitmask(spec: Spec) -> Layout:
    """Return the shapes of ``mask`` and ``values``."""
    m, n = matrix_shape(spec)
    return {"mask": ((-(-m * n // 8),), torch.uint8), "values": ((spec["nnz"],), parse_dtype(spec["dtype"]))}
