"""Integers of 2 to 8 bits with one grid for every group of consecutive inputs, as compressed-tensors packs them.

value = (code - zero) * scale, in fp32, then cast to the spec's dtype

The parts are, byte for byte, what its format ``pack-quantized`` (0.17 and later) calls ``weight_packed``,
``weight_scale``, ``weight_shape`` and, with zero points, ``weight_zero_point``: ``code + 2^(bits-1)`` in a stream of
bits, lowest first, each row of the matrix (for zero points: each column of theirs) filled up to whole 32-bit words.

Readers of that package multiply in the dtype of the scales, and some leave the matrix in it, so scales are stored in
the matrix's own dtype. Their values are numbers that bf16 and fp16 both have (`portable_scale`): a method need not know
what dtype that will be, and as codes and scales then have 8 significant bits each, the product is rounded only once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats.bits import pack_codes, unpack_codes
from compressor.formats.parts import Layout, Spec, check_parts, dtype_name, matrix_shape, parse_dtype

INT_WORD = 32
SMALLEST_INT_SCALE = 2.0**-24


@dataclass(frozen=True, eq=False)
class GroupInt:
    """Codes on one grid a group: value = (code - zero) * scale.

    Attributes:
        codes: (m, n) int8, from -2^(bits-1) to 2^(bits-1) - 1.
        scale: (m, G) fp32, portable (see `portable_scale`), of either sign; G divides n.
        zero: (m, G) int8, in the range of the codes, or None: zero is code 0.
        bits: 2 to 8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (m, n)."""
        return group_int_values(self.codes, self.scale, self.zero, dtype)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored; ``dtype`` is that of the unpacked matrix."""
        return {
            "format": "group-int",
            "shape": list(self.codes.shape),
            "dtype": dtype_name(dtype),
            "bits": self.bits,
            "group": max(1, self.codes.shape[1] // max(1, self.scale.shape[1])),
            "symmetric": self.zero is None,
        }

    def parts(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the packed tensors; ``dtype`` is that of the unpacked matrix.

        Returns:
            ``packed`` int32 (m, ceil(n bits / 32)), ``scale`` (m, G), ``shape`` int64 (2,), and with zero points
            ``zero_point`` int32 (ceil(m bits / 32), G).

        Raises:
            ValueError: a code or zero point that does not fit, a scale that is not portable, or a shape or dtype
                other than the attributes promise.
        """
        self._check()
        parts = {
            "packed": pack_rows(self.codes, self.bits),
            "scale": self.scale.to(dtype),
            "shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.zero is not None:
            parts["zero_point"] = pack_rows(self.zero.T, self.bits).T.contiguous()
        return parts

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> GroupInt:
        """Return what was stored; ValueError names a part that does not fit the spec."""
        return cls(*group_int_codes(parts, spec), spec["bits"])

    def _check(self) -> None:
        m, n = self.codes.shape
        groups = self.scale.shape[-1]
        if self.codes.dtype != torch.int8 or self.scale.shape != (m, groups) or (groups and n % groups):
            raise ValueError(f"codes {list(self.codes.shape)} {self.codes.dtype} with scales {list(self.scale.shape)}")
        if self.zero is not None and (self.zero.dtype != torch.int8 or self.zero.shape != self.scale.shape):
            raise ValueError(f"zero points must be int8 like the scales, got {self.zero.dtype} {list(self.zero.shape)}")
        if self.scale.dtype != torch.float32 or not torch.equal(portable_scale(self.scale, self.bits), self.scale):
            raise ValueError("scales must be fp32 numbers that bf16 and fp16 can represent")


def portable_scale(scale: Tensor, bits: int) -> Tensor:
    """Return ``scale`` (any shape) rounded to fp32 numbers that bf16 and fp16 both represent exactly; the sign stays.

    They have 8 significant bits, are multiples of 2^-24 and no zeros, and so small that no value of a ``bits``-bit code
    overflows in fp16: magnitudes from 2^-24 to 2^(16-bits). NaN raises ValueError.
    """
    if bool(torch.isnan(scale).any()):
        raise ValueError("a scale is not a number")
    size = scale.float().abs().clamp(SMALLEST_INT_SCALE, 2.0 ** (16 - bits)).half().bfloat16().float()
    return torch.where(scale < 0, -size, size)


def unpack_group_int(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    return group_int_values(*group_int_codes(parts, spec), parse_dtype(spec["dtype"]))


def group_int_codes(parts: Mapping[str, Tensor], spec: Spec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (codes (m, n) int8, scale (m, G) fp32, zero (m, G) int8 or None)."""
    check_parts(parts, layout_group_int(spec), "group-int")
    m, n = matrix_shape(spec)
    if parts["shape"].tolist() != [m, n]:
        raise ValueError(f"part 'shape' says {parts['shape'].tolist()}, expected {[m, n]}")
    codes = unpack_rows(parts["packed"], spec["bits"], n)
    zero = None if spec["symmetric"] else unpack_rows(parts["zero_point"].T, spec["bits"], m).T.contiguous()
    return codes, parts["scale"].float(), zero


def group_int_values(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values (m, n) of the codes in ``dtype``; shapes as in `GroupInt`."""
    m, n = codes.shape
    groups = scale.shape[1]
    weight = torch.empty((m, n), dtype=dtype, device=codes.device)
    rows = max(1, (1 << 22) // max(1, n))
    for start in range(0, m if n else 0, rows):
        part = slice(start, start + rows)
        value = codes[part].float().view(-1, groups, n // groups)
        if zero is not None:
            value -= zero[part, :, None].float()
        weight[part] = value.mul_(scale[part, :, None]).flatten(1).to(dtype)
    return weight


def layout_group_int(spec: Spec) -> Layout:
    """Return the shapes of ``packed``, ``scale``, ``shape`` and, unless symmetric, ``zero_point``."""
    m, n = matrix_shape(spec)
    bits, group = spec["bits"], spec["group"]
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits: expected 2 to 8")
    if group < 1 or n % group:
        raise ValueError(f"groups of {group} inputs do not divide {n}")
    layout: Layout = {
        "packed": ((m, -(-n * bits // INT_WORD)), torch.int32),
        "scale": ((m, n // group), parse_dtype(spec["dtype"])),
        "shape": ((2,), torch.int64),
    }
    if not spec["symmetric"]:
        layout["zero_point"] = ((-(-m * bits // INT_WORD), n // group), torch.int32)
    return layout


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of ``codes`` (m, n) int8 on its own: int32 (m, ceil(n bits / 32)); ValueError if one is too big."""
    m, n = codes.shape
    low = -(2 ** (bits - 1))
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) >= -low):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit into {bits} bits")
    padded = torch.nn.functional.pad((codes.to(torch.int16) - low).to(torch.uint8), (0, -n % INT_WORD))
    words = pack_codes(padded.reshape(-1), bits).view(torch.int32).view(m, padded.shape[1] * bits // INT_WORD)
    return words[:, : -(-n * bits // INT_WORD)].contiguous()


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return codes (m, n) int8: the inverse of `pack_rows`."""
    m = packed.shape[0]
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).contiguous()
    columns = words.shape[1] * INT_WORD // bits
    codes = unpack_codes(words.view(torch.uint8).reshape(-1), bits, m * columns).view(m, columns)[:, :n]
    return codes.to(torch.int16).sub_(2 ** (bits - 1)).to(torch.int8)
