"""A few whole inputs as integers, every other weight one sign, with a scale a row and a scale an input (PTQ1.61).

    W[i, j] = (codes[i, j] - zero[i]) * step[i]              where input j is salient
            = column[j] * (mean[i] + scale[i] or - scale[i])  elsewhere

(arXiv 2502.13179, section 3.3) in fp32, then cast to the spec's dtype. Codes and signs follow each other in row-major
order without gaps; ``salient`` tells which inputs are which, one bit an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats.bits import pack_bits, pack_codes, unpack_bits, unpack_codes
from compressor.formats.parts import Layout, Spec, check_parts, dtype_name, matrix_shape, parse_dtype


@dataclass(frozen=True, eq=False)
class ScaledBinary:
    """Signs with a mean and a scale a row and a scale an input, and inputs of integers with a grid a row.

    Attributes:
        signs: (m, n - k) bool, True = plus: of the inputs that are not salient.
        scale: (m,) fp16.
        mean: (m,) fp16.
        column: (n - k,) fp16.
        salient: (n,) bool, k of them True.
        codes: (m, k) uint8, below 2**bits.
        step: (m,) fp16.
        zero: (m,) uint8, the code of the value 0.
        bits: of a code, 2 to 8.
    """

    signs: Tensor
    scale: Tensor
    mean: Tensor
    column: Tensor
    salient: Tensor
    codes: Tensor
    step: Tensor
    zero: Tensor
    bits: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (m, n): computed in fp32, rounded once to ``dtype``."""
        weight = torch.empty(len(self.signs), len(self.salient), dtype=dtype, device=self.signs.device)
        scale, mean = self.scale.float()[:, None], self.mean.float()[:, None]
        weight[:, ~self.salient] = (torch.where(self.signs, mean + scale, mean - scale) * self.column.float()).to(dtype)
        integers = (self.codes.float() - self.zero.float()[:, None]) * self.step.float()[:, None]
        weight[:, self.salient] = integers.to(dtype)
        return weight

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored; ``dtype`` is that of the unpacked matrix."""
        return {
            "format": "scaled-binary",
            "shape": [len(self.signs), len(self.salient)],
            "dtype": dtype_name(dtype),
            "inputs": int(self.salient.sum()),
            "bits": self.bits,
        }

    def parts(self) -> dict[str, Tensor]:
        """Return what is stored, see `layout_scaled_binary`; ValueError for an attribute of another shape or dtype."""
        parts = {
            "signs": pack_bits(self.signs),
            "scale": self.scale,
            "mean": self.mean,
            "column": self.column,
            "salient": pack_bits(self.salient),
            "codes": pack_codes(self.codes.reshape(-1), self.bits),
            "step": self.step,
            "zero": self.zero,
        }
        check_parts(parts, layout_scaled_binary(self.spec(torch.float32)), "scaled-binary")
        return parts

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> ScaledBinary:
        """Return what was stored, bit for bit; ValueError names a part that does not fit the spec."""
        check_parts(parts, layout_scaled_binary(spec), "scaled-binary")
        (m, n), k, bits = matrix_shape(spec), spec["inputs"], spec["bits"]
        salient = unpack_bits(parts["salient"], n)
        if int(salient.sum()) != k:
            raise ValueError(f"scaled-binary: part 'salient' marks {int(salient.sum())} inputs, expected {k}")
        return cls(
            unpack_bits(parts["signs"], m * (n - k)).view(m, n - k),
            parts["scale"],
            parts["mean"],
            parts["column"],
            salient,
            unpack_codes(parts["codes"], bits, m * k).view(m, k),
            parts["step"],
            parts["zero"],
            bits,
        )


def unpack_scaled_binary(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    return ScaledBinary.read(parts, spec).dense(parse_dtype(spec["dtype"]))


def layout_scaled_binary(spec: Spec) -> Layout:
    """Return the shapes of the parts, in the order of the attributes of `ScaledBinary`."""
    (m, n), k, bits = matrix_shape(spec), spec["inputs"], spec["bits"]
    parse_dtype(spec["dtype"])
    if not 0 <= k <= n:
        raise ValueError(f"{k} salient inputs of {n}")
    if not 2 <= bits <= 8:
        raise ValueError(f"salient inputs of {bits} bits: expected 2 to 8")
    return {
        "signs": ((-(-m * (n - k) // 8),), torch.uint8),
        "scale": ((m,), torch.float16),
        "mean": ((m,), torch.float16),
        "column": ((n - k,), torch.float16),
        "salient": ((-(-n // 8),), torch.uint8),
        "codes": ((-(-m * k * bits // 8),), torch.uint8),
        "step": ((m,), torch.float16),
        "zero": ((m,), torch.uint8),
    }
