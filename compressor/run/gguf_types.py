"""Which GGUF type says a packed matrix: exactly, where its numbers are integers on a grid, or rounded once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import UserError
from compressor.formats.group_int import GroupInt
from compressor.formats.representation import Representation, SparseInt
from compressor.formats.trit_planes import TritPlanes
from compressor.run.gguf_blocks import PACK, Bytes, Codes, Scales

CODES = {"TQ1_0": (-1, 1), "TQ2_0": (-1, 1), "Q4_0": (-8, 7), "Q8_0": (-128, 127)}
"""Type -> smallest and largest code."""

BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5, "TQ2_0": 2.0625, "TQ1_0": 1.6875}
"""Bits a weight, scales included."""


@dataclass(frozen=True)
class Integers:
    """A matrix as ``codes`` (m, n) times ``scale`` (m, ceil(n / group)), one for ``group`` consecutive inputs."""

    codes: Codes
    scale: Scales
    group: int

    def scales(self, block: int) -> Scales:
        """The scales (m, n / block) of blocks of ``block`` inputs, which must divide both rows and groups."""
        n = self.codes.shape[1]
        return np.repeat(self.scale, self.group // block, axis=1)[:, : n // block]


def integers_of(code: Representation) -> Integers | None:
    """The integers of a packed matrix; ``None`` when it is made of anything else, such as a sum of planes."""
    if isinstance(code, GroupInt):
        codes = code.codes.to(torch.int16)
        n = codes.shape[1]
        group = n // code.scale.shape[1]
        if code.zero is not None:
            codes = codes - code.zero.to(torch.int16).repeat_interleave(group, dim=1)
        return _integers(codes, code.scale, group)
    if isinstance(code, TritPlanes) and len(code.trits) == 1:
        n = code.trits.shape[2]
        return _integers(code.trits[0], code.scale[0], n if code.scale.shape[2] == 1 else code.group)
    if isinstance(code, SparseInt):
        codes = (code.codes.to(torch.int16) - code.zero[:, None].to(torch.int16)) * code.mask
        return _integers(codes, code.scale[:, None], codes.shape[1])
    return None


def _integers(codes: Tensor, scale: Tensor, group: int) -> Integers | None:
    if codes.numel() and (int(codes.min()) < -128 or int(codes.max()) > 127):
        return None  # differences from a zero point need more than a byte
    return Integers(codes.to(torch.int8).numpy(), scale.float().numpy(), group)


def obstacle(kind: str, integers: Integers | None, columns: int) -> str | None:
    """Why ``kind``, one of `CODES`, does not say a matrix exactly; ``None`` when it does."""
    block = PACK[kind][0]
    if columns % block:
        return f"rows of {columns} are no blocks of {block}"
    if integers is None:
        return "it is no matrix of integers with one scale a group"
    if integers.group % block:
        return f"groups of {integers.group} do not fill blocks of {block}"
    low, high = CODES[kind]
    codes = integers.codes
    if codes.size and (int(codes.min()) < low or int(codes.max()) > high):
        return f"its integers go from {int(codes.min())} to {int(codes.max())}, not from {low} to {high}"
    with np.errstate(over="ignore"):
        if not np.array_equal(integers.scale.astype(np.float16).astype(np.float32), integers.scale):
            return "its scales are no fp16 numbers"
    return None


def exact_type(integers: Integers | None, columns: int) -> str | None:
    """The smallest type that says a matrix exactly, and that llama.cpp multiplies fast; ``None``: only floats do."""
    return next((kind for kind in ("TQ2_0", "Q4_0", "Q8_0") if obstacle(kind, integers, columns) is None), None)


@dataclass(frozen=True)
class Encoded:
    """A matrix in a type: ``data`` (m, bytes of a row), and the error it makes.

    ``loss`` is the root of the mean square of the error over that of the matrix; 0 says that every value is the same.
    """

    data: Bytes
    loss: float


def encode(kind: str, values: NDArray[np.float32], integers: Integers | None, name: str) -> Encoded:
    """Write a matrix in ``kind``, from its integers where they fit, else by rounding its values to nearest.

    Args:
        values: (m, n) fp32, what the folder says.
        name: of the tensor, for complaints.

    Raises:
        UserError: a value is too large for fp16.
    """
    if kind in CODES and integers is not None and obstacle(kind, integers, values.shape[1]) is None:
        block, pack = PACK[kind]
        data = pack(integers.codes, integers.scales(block))
    else:
        data = rounded(kind, values)
    decoded = decode(kind, data)
    if not np.isfinite(decoded).all():
        raise UserError(f"{name} holds values too large for {kind}", fix="--type BF16, or F32")
    return Encoded(data, loss(decoded, values))


def rounded(kind: str, values: NDArray[np.float32]) -> Bytes:
    """``values`` (m, n) in ``kind``, each block rounded to nearest as llama.cpp itself does it."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(over="ignore"):
        data = quants.quantize(np.ascontiguousarray(values), GGMLQuantizationType[kind])
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(values), -1)


def decode(kind: str, data: Any) -> NDArray[np.float32]:
    """The values (m, n) fp32 that a reader finds in ``data`` (m, bytes of a row)."""
    from gguf import GGMLQuantizationType, quants

    found: NDArray[np.float32] = quants.dequantize(np.ascontiguousarray(data), GGMLQuantizationType[kind])
    return found


def loss(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Root mean square of the difference over that of ``wanted``; 0 exactly when all values are the same."""
    if np.array_equal(found, wanted):
        return 0.0
    scale = float(np.sqrt(np.square(wanted, dtype=np.float64).mean())) or 1.0
    return float(np.sqrt(np.square(found.astype(np.float64) - wanted).mean())) / scale
