"""A few salient weights as integers, every other weight one sign: partial binarization (PB-LLM, arXiv 2310.00034).

    W[i, j] = (codes[i, j] - zero[i]) * step                 where salient
            = mean[i, g] + scale[i, g] or - scale[i, g]      elsewhere, g = j // group

in fp32, then cast to the spec's dtype. The last group of a row may be shorter. A step is that of a row, or, where whole
inputs are salient, that of an input. Signs and codes follow each other in row-major order without gaps, signs only
where a weight is not salient; :mod:`mask_codes` tells where that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats.bits import pack_bits, pack_codes, unpack_bits, unpack_codes
from compressor.formats.mask_codes import cheapest_mask, mask_nbytes, pack_mask, unpack_mask
from compressor.formats.parts import Layout, Spec, check_parts, dtype_name, matrix_shape, parse_dtype

PARTIAL_CHUNK = 1 << 20
"""Weights whose value is computed at once, so that intermediates stay small beside the matrix."""


@dataclass(frozen=True, eq=False)
class PartialBinary:
    """Signs with a mean and a scale a group, and integers with a grid a row or an input.

    Attributes:
        signs: (m, n) bool, True = plus; False where salient.
        scale: (m, ceil(n / group)) fp16.
        mean: the same, or None: zero.
        salient: (m, n) bool.
        codes: (m, n) uint8, below 2**bits; 0 where not salient.
        step: fp16, (m, 1), one for each row; or (1, n), one for each input, 0 where an input is not salient.
        zero: (m,) uint8, the code of the value 0; or None: 2**(bits - 1).
        bits: of a code, 2 to 8.
        group: how many consecutive inputs share scale and mean, from 1 to n (1 where n is 0).
    """

    signs: Tensor
    scale: Tensor
    mean: Tensor | None
    salient: Tensor
    codes: Tensor
    step: Tensor
    zero: Tensor | None
    bits: int
    group: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (m, n): computed in fp32, rounded once to ``dtype``."""
        m, n = self.signs.shape
        weight = torch.empty(m, n, dtype=dtype, device=self.signs.device)
        rows = max(1, PARTIAL_CHUNK // max(1, n))
        for start in range(0, m, rows):
            part = slice(start, start + rows)
            scale = self._spread(self.scale[part], n)
            value = torch.where(self.signs[part], scale, -scale)
            if self.mean is not None:
                value += self._spread(self.mean[part], n)
            weight[part] = torch.where(self.salient[part], self._integers(part), value).to(dtype)
        return weight

    def _integers(self, part: slice) -> Tensor:
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero[part, None].float()
        step = self.step if self.by_input else self.step[part]
        return (self.codes[part].float() - zero) * step.float()

    def _spread(self, values: Tensor, n: int) -> Tensor:
        return values.float().repeat_interleave(self.group, dim=1)[:, :n]

    @property
    def by_input(self) -> bool:
        """Whether there is a step for every salient input, and not one for every row."""
        return self.step.shape != (self.signs.shape[0], 1)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored; ``dtype`` is that of the unpacked matrix."""
        return {
            "format": "partial-binary",
            "shape": list(self.signs.shape),
            "dtype": dtype_name(dtype),
            "group": self.group,
            "mean": self.mean is not None,
            "bits": self.bits,
            "zero": self.zero is not None,
            "by_input": self.by_input,
            **cheapest_mask(self.salient),
        }

    def parts(self) -> dict[str, Tensor]:
        """Return what is stored, see `layout_partial_binary`.

        Raises:
            ValueError: an attribute of another shape or dtype, a code that does not fit, or steps for inputs that are
                salient in some rows only.
        """
        spec = self.spec(torch.float32)
        layout = layout_partial_binary(spec)
        parts = {"signs": pack_bits(torch.masked_select(self.signs, ~self.salient)), "scale": self.scale}
        if self.mean is not None:
            parts["mean"] = self.mean
        if spec["nnz"]:
            parts["codes"] = pack_codes(torch.masked_select(self.codes, self.salient), self.bits)
            parts["step"] = self.step[0, self.salient[0]] if self.by_input else self.step[:, 0]
            if self.zero is not None:
                parts["zero"] = self.zero
        if "mask" in layout:
            parts["mask"] = pack_mask(self.salient, spec)
        check_parts(parts, layout, "partial-binary")
        return parts

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> PartialBinary:
        """Return what was stored, bit for bit; ValueError names a part that does not fit the spec.

        Without salient weights there are no grids, and their steps read as zero.
        """
        check_parts(parts, layout_partial_binary(spec), "partial-binary")
        m, n = matrix_shape(spec)
        nnz, scale = spec["nnz"], parts["scale"]
        salient = unpack_mask(parts["mask"] if "mask" in parts else parts["signs"][:0], spec)
        signs = torch.zeros_like(salient).masked_scatter_(~salient, unpack_bits(parts["signs"], m * n - nnz))
        codes = torch.zeros_like(salient, dtype=torch.uint8)
        step = scale.new_zeros((1, n) if spec["by_input"] else (m, 1))
        zero = codes.new_zeros(m) if spec["zero"] else None
        if nnz:
            codes.masked_scatter_(salient, unpack_codes(parts["codes"], spec["bits"], nnz))
            step = step.masked_scatter(salient[:1], parts["step"]) if spec["by_input"] else parts["step"][:, None]
            zero = parts.get("zero")
        return cls(signs, scale, parts.get("mean"), salient, codes, step, zero, spec["bits"], spec["group"])


def unpack_partial_binary(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    return PartialBinary.read(parts, spec).dense(parse_dtype(spec["dtype"]))


def layout_partial_binary(spec: Spec) -> Layout:
    """Return the shapes of all parts; those that would be empty are left out.

    ``signs`` uint8 (ceil((mn - nnz) / 8),); ``scale`` and, if the spec says so, ``mean`` fp16 (m, ceil(n / group)). If
    anything is salient ``codes`` uint8 (ceil(nnz bits / 8),), ``step`` fp16 (m,) or (salient inputs,), and, if the spec
    says so, ``zero`` uint8 (m,). If their positions have to be said, ``mask`` uint8.
    """
    m, n = matrix_shape(spec)
    group, bits, nnz = spec["group"], spec["bits"], spec["nnz"]
    parse_dtype(spec["dtype"])
    if not 1 <= group <= max(1, n):
        raise ValueError(f"groups of {group} among {n} inputs: expected 1 to {max(1, n)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"salient weights of {bits} bits: expected 2 to 8")
    if not 0 <= nnz <= m * n:
        raise ValueError(f"{nnz} salient weights of {m * n}")
    if spec["by_input"] and spec["mask"] not in ("none", "all", "inputs"):
        raise ValueError(f"steps for whole inputs, and a mask by {spec['mask']}")
    grouped = ((m, -(-n // group)), torch.float16)
    layout: Layout = {"signs": ((-(-(m * n - nnz) // 8),), torch.uint8), "scale": grouped}
    if spec["mean"]:
        layout["mean"] = grouped
    if nnz:
        layout["codes"] = ((-(-nnz * bits // 8),), torch.uint8)
        layout["step"] = ((nnz // m if spec["by_input"] else m,), torch.float16)
        if spec["zero"]:
            layout["zero"] = ((m,), torch.uint8)
    if mask := mask_nbytes(m, n, spec):
        layout["mask"] = ((mask,), torch.uint8)
    return layout
