"""How a partially binarized matrix lies in GPU memory: one bit a weight, and the salient weights row after row.

    W[i, j] = mean[i, g] - scale[i, g] + 2 scale[i, g] bit[i, j],    g = j // group, where not salient
            = (code - zero[i]) * step                                where salient

The bits are fields of words as in :mod:`layouts`, with runs of 16; where a weight is salient the bit is 0. A salient
weight is a 32-bit entry, input * 256 + code, so that the product needs no map of where they are: it adds, for each
entry, the activation times what the weight is more than a 0 bit. That is 1 + 32 s + 48 / group bits a weight at a share
s of salient ones; a map and bare codes would be less, but cost more instructions than the bytes they save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.bits import unpack_bits, unpack_codes
from compressor.formats.mask_codes import unpack_mask
from compressor.formats.partial_binary import layout_partial_binary
from compressor.formats.parts import Spec, check_parts, matrix_shape, parse_dtype
from compressor.kernels.triton.layouts import ACTIVATION_GROUP, pack_fields, row_slices, unpack_fields

SIGN_RUN = 16
MOST_SALIENT = 0.25
"""The share of salient weights above which entries would take more than half of what plain 16-bit weights do."""

MOST_INPUTS = 1 << 23


@dataclass(frozen=True, eq=False)
class SparseSigns:
    """A matrix of signs with salient weights.

    Attributes:
        words: int32 (m, 4 chunks): the bits of 128 inputs are four words.
        scale: fp16 (m, G).
        low: fp32 (m, G): mean - scale, the value of a 0 bit.
        entries: int32 (nnz,), input * 256 + code, in row-major order.
        starts: int32 (m + 1,): where in ``entries`` each row begins.
        step: fp16 (m,), or (n,) where ``by_input``.
        zero: uint8 (m,), or None: ``middle``.
        middle: 2^(bits - 1).
        by_input: whether a step is that of an input.
        group: inputs that share a scale and a mean; where all of a row do, any number not below n.
        n: inputs.
        dtype: to which values are rounded: that of the spec.
    """

    words: Tensor
    scale: Tensor
    low: Tensor
    entries: Tensor
    starts: Tensor
    step: Tensor
    zero: Tensor | None
    middle: int
    by_input: bool
    group: int
    n: int
    dtype: torch.dtype

    @property
    def m(self) -> int:
        """Outputs."""
        return self.words.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all of which a product reads."""
        tensors = (self.words, self.scale, self.low, self.entries, self.starts, self.step, self.zero)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def dense(self) -> Tensor:
        """Return the matrix (m, n) in ``dtype``; waits for no device, so that a CUDA graph can hold it."""
        columns = torch.arange(self.n, device=self.words.device) // self.group
        weight = torch.empty(self.m, self.n, dtype=self.dtype, device=self.words.device)
        for rows in row_slices(self.m, self.n):
            bits = unpack_fields(self.words[rows], 1, SIGN_RUN)[:, : self.n]
            high = self.low[rows] + 2 * self.scale[rows].float()  # mean + scale, but where one is 2^13 times the other
            weight[rows] = torch.where(bits > 0, high[:, columns], self.low[rows][:, columns]).to(self.dtype)
        row = torch.repeat_interleave(self.starts.diff(), output_size=self.entries.numel())
        column, code = self.entries >> 8, (self.entries & 255).float()
        zero = self.middle if self.zero is None else self.zero.float()[row]
        value = (code - zero) * self.step.float()[column if self.by_input else row]
        weight[row, column] = value.to(self.dtype)
        return weight


def signs_reason(spec: Spec) -> str | None:
    """Return why a spec of ``partial-binary`` has no layout here, or None."""
    m, n = matrix_shape(spec)
    if not m or not n or n >= MOST_INPUTS:
        return f"a matrix of {m} x {n}"
    if parse_dtype(spec["dtype"]) == torch.float64:
        return "values are float64"
    if spec["group"] < n and spec["group"] % SIGN_RUN:
        return f"groups of {spec['group']} inputs are not a multiple of {SIGN_RUN}"
    if spec["nnz"] > MOST_SALIENT * m * n:
        return f"{spec['nnz'] / (m * n):.0%} of the weights are salient, more than {MOST_SALIENT:.0%}"
    return None


def make_signs(parts: Mapping[str, Tensor], spec: Spec, device: torch.device | str) -> SparseSigns:
    """Return the layout of a matrix in ``partial-binary``; meanwhile a byte a weight says which are salient.

    Raises:
        ValueError: a part does not fit the spec, or `signs_reason` refuses.
    """
    check_parts(parts, layout_partial_binary(spec), "partial-binary")
    if (reason := signs_reason(spec)) is not None:
        raise ValueError(f"partial-binary: {reason}")
    (m, n), bits, nnz = matrix_shape(spec), spec["bits"], spec["nnz"]
    salient = unpack_mask(parts["mask"] if "mask" in parts else parts["signs"][:0], spec)
    counts = salient.sum(dim=1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    short = -n % ACTIVATION_GROUP
    words = torch.empty(m, (n + short) // 32, dtype=torch.int32, device=device)
    entries = torch.empty(nnz, dtype=torch.int32, device=device)
    for rows in row_slices(m, n):
        part = salient[rows]
        first, last = int(starts[rows.start]), int(starts[rows.stop])
        flags = _bits(parts["signs"], rows.start * n - first, rows.stop * n - last)
        plus = torch.zeros_like(part).masked_scatter_(~part, flags).to(device).view(torch.uint8)
        words[rows] = pack_fields(torch.nn.functional.pad(plus, (0, short)), 1, SIGN_RUN)
        if last > first:
            codes = _codes(parts["codes"], bits, first, last)
            entries[first:last] = (part.nonzero()[:, 1].int() * 256 + codes.int()).to(device)
    scale, mean, step, zero = (parts.get(name) for name in ("scale", "mean", "step", "zero"))
    assert scale is not None
    low = -scale.float() if mean is None else mean.float() - scale.float()
    if step is None:
        step = scale.new_zeros(n if spec["by_input"] else m)
    elif spec["by_input"]:
        step = scale.new_zeros(n).masked_scatter(salient[0].to(scale.device), step)
    return SparseSigns(
        words,
        scale.to(device).contiguous(),
        low.to(device).contiguous(),
        entries,
        starts.int().to(device),
        step.to(device),
        None if zero is None else zero.to(device),
        2 ** (bits - 1),
        spec["by_input"],
        spec["group"],
        n,
        parse_dtype(spec["dtype"]),
    )


def _bits(packed: Tensor, first: int, last: int) -> Tensor:
    """Return the booleans ``first`` to ``last`` of a stream of bits."""
    start = first // 8
    return unpack_bits(packed[start : -(-last // 8)], last - 8 * start)[first - 8 * start :]


def _codes(packed: Tensor, bits: int, first: int, last: int) -> Tensor:
    """Return the codes ``first`` to ``last`` of a stream of them: eight begin at a byte."""
    start = first // 8
    return unpack_codes(packed[start * bits : -(-last * bits // 8)], bits, last - 8 * start)[first - 8 * start :]
