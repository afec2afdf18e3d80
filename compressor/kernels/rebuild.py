"""From a layout back to what is stored: so that a model need not hold its large tensors twice."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.group_int import pack_rows
from compressor.formats.parts import Spec
from compressor.formats.trits import pack_trits
from compressor.kernels.matrix import Kind, Matrix
from compressor.kernels.native import native

LARGE = {"trit-planes": "trits", "group-int": "packed"}
"""Format -> the part that can be made from the layout, bit for bit. Other formats are held as they are stored, too."""


def large_part(spec: Spec, product: object) -> str | None:
    """Return the part that need not be kept beside ``product``, or None."""
    return LARGE.get(spec["format"]) if isinstance(product, Matrix) else None


def entries_of(matrix: Matrix) -> Tensor:
    """Return the planes of entries (P, m, n) uint8 of a matrix of records."""
    found = native()
    assert found is not None
    planes = {Kind.TRIT2: 2, Kind.TRIT3: 3, Kind.INT3: 2}.get(matrix.kind, 1)
    out = torch.empty(planes, matrix.m, matrix.n, dtype=torch.uint8)
    found.module.read_records(*matrix.arguments, out.data_ptr(), torch.get_num_threads())
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]  # addresses, which graphs know nothing of
def rebuilt(matrix: Matrix, spec: Spec) -> dict[str, Tensor]:
    """Return the large part of a matrix, by its name."""
    entries = entries_of(matrix)
    if spec["format"] == "trit-planes":
        return {"trits": torch.stack([pack_trits(plane.view(torch.int8) - 1) for plane in entries])}
    codes = entries[0] if len(entries) == 1 else entries[0] | (entries[1] << 2)
    signed = codes.to(torch.int16) - (1 << (spec["bits"] - 1))
    return {"packed": pack_rows(signed.to(torch.int8), spec["bits"])}
