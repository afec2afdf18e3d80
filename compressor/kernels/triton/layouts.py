"""How packed matrices lie in GPU memory: codes of 2, 4 or 8 bits in 32-bit words, made from the parts of a format.

Trit planes and group integers are one thing here, a sum of planes of codes with a scale (and a zero) a group:

    W[i, j] = sum over p of scale[p, i, j // group] * (code[p, i, j] - zero[p, i, j // group])

A trit is the code 0, 1 or 2 with the zero 1. Where code bits are fewer than 8, codes are unsigned. A row is cut into
blocks of ``fields * run`` inputs, ``fields = 8 / bits``; byte c of a block holds the codes of the inputs
``f * run + c`` of the block, f = 0 .. fields - 1, in its bits ``f * bits ..``. So a shift and an AND of a word give the
codes of four *consecutive* inputs in its four bytes, which a dot product of four bytes (or a tensor core) takes as they
are, against activations in their natural order.

Codes of 3 bits are held in 4, of 5 to 7 bits in 8: a field that straddles bytes costs more instructions than the bytes
it saves. Memory for them is that of the wider codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.group_int import unpack_rows
from compressor.formats.parts import Spec, check_parts, matrix_shape, parse_dtype
from compressor.formats.registry import format_of
from compressor.formats.trits import TRITS_PER_BYTE, unpack_trits

ACTIVATION_GROUP = 128
"""How many activations share a scale when they are rounded to int8."""

SMALLEST_RUN = 32
"""Inputs a dot product takes at least: an int8 tensor core instruction has 32 of them."""

ROWS_CHUNK = 1 << 22
"""Weights packed at once, so that intermediates stay small beside the matrix."""


@dataclass(frozen=True, eq=False)
class Planes:
    """A matrix as planes of codes.

    Attributes:
        words: int32 (P, m, blocks * run / 4), see the head of this file; what stands for inputs beyond n is the zero.
        scale: (P, m, G) fp16, bf16 or fp32, G = ceil(n / group).
        zero: int8 (P, m, G), or None: ``offset`` everywhere.
        offset: the zero of all groups where ``zero`` is None.
        bits: 2, 4 or 8.
        run: inputs of a block whose codes stand in the same field: a multiple of 32 that divides the group.
        group: inputs that share a scale; where all of a row do, any number not below n.
        n: inputs.
        dtype: to which values are rounded where the matrix is unpacked: that of the spec.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: int
    bits: int
    run: int
    group: int
    n: int
    dtype: torch.dtype

    @property
    def m(self) -> int:
        """Outputs."""
        return self.words.shape[1]

    @property
    def padded(self) -> int:
        """Inputs for which there are codes."""
        return self.words.shape[2] * 4 * (8 // self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all of which a product reads."""
        tensors = [self.words, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> Planes:
        """Return it on ``device``."""
        zero = None if self.zero is None else self.zero.to(device)
        words, scale = self.words.to(device), self.scale.to(device)
        return Planes(words, scale, zero, self.offset, self.bits, self.run, self.group, self.n, self.dtype)

    def dense(self) -> Tensor:
        """Return the matrix (m, n) in ``dtype``, by torch alone: a check, and the way out where there is no Triton."""
        columns = torch.arange(self.n, device=self.words.device) // self.group
        total = torch.zeros(self.m, self.n, device=self.words.device)
        for p in range(self.words.shape[0]):
            code = unpack_fields(self.words[p], self.bits, self.run)[:, : self.n].float()
            zero = self.offset if self.zero is None else self.zero[p].float()[:, columns]
            total.addcmul_(code - zero, self.scale[p].float()[:, columns])
        return total.to(self.dtype)


def run_for(bits: int, group: int, n: int) -> int | None:
    """Return the run for codes of ``bits`` (2, 4, 8): blocks of 128 inputs, or shorter; None: groups are too odd."""
    run = ACTIVATION_GROUP * bits // 8
    while run >= SMALLEST_RUN and group < n and group % run:
        run //= 2
    return run if run >= SMALLEST_RUN else None


def held_bits(bits: int) -> int:
    """Return in how many bits codes of ``bits`` (2 to 8) are held in memory."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def planes_reason(spec: Spec) -> str | None:
    """Return why a spec of ``trit-planes`` or ``group-int`` has no layout here, or None."""
    m, n = matrix_shape(spec)
    bits = 2 if spec["format"] == "trit-planes" else held_bits(spec["bits"])
    if not m or not n:
        return "the matrix is empty"
    if parse_dtype(spec["dtype"]) == torch.float64:
        return "values are float64"
    if run_for(bits, spec["group"], n) is None:
        return f"groups of {spec['group']} inputs are not a multiple of {SMALLEST_RUN}"
    return None


def make_planes(parts: Mapping[str, Tensor], spec: Spec, device: torch.device | str) -> Planes:
    """Return the layout of a matrix in ``trit-planes`` or ``group-int``; rows travel to ``device`` a few at a time.

    Raises:
        ValueError: a part does not fit the spec, or `planes_reason` refuses.
    """
    check_parts(parts, format_of(spec).layout(spec), spec["format"])
    if (reason := planes_reason(spec)) is not None:
        raise ValueError(f"{spec['format']}: {reason}")
    return _from_trits(parts, spec, device) if spec["format"] == "trit-planes" else _from_integers(parts, spec, device)


def _from_trits(parts: Mapping[str, Tensor], spec: Spec, device: torch.device | str) -> Planes:
    (m, n), planes = matrix_shape(spec), spec["planes"]
    run = run_for(2, spec["group"], n)
    assert run is not None

    def codes(plane: int, rows: slice) -> Tensor:
        first, last = rows.start * n, rows.stop * n
        start = first // TRITS_PER_BYTE
        stream = parts["trits"][plane, start : -(-last // TRITS_PER_BYTE)].to(device)
        skip = first - start * TRITS_PER_BYTE
        trits = unpack_trits(stream, last - start * TRITS_PER_BYTE)[skip:]
        return (trits + 1).view(torch.uint8).view(-1, n)

    words = _pack_planes(codes, (planes, m, n), 2, run, 1, device)
    scale = parts["scale"].to(device).contiguous()
    return Planes(words, scale, None, 1, 2, run, spec["group"], n, parse_dtype(spec["dtype"]))


def _from_integers(parts: Mapping[str, Tensor], spec: Spec, device: torch.device | str) -> Planes:
    (m, n), bits = matrix_shape(spec), spec["bits"]
    held = held_bits(bits)
    run = run_for(held, spec["group"], n)
    assert run is not None
    if parts["shape"].tolist() != [m, n]:
        raise ValueError(f"part 'shape' says {parts['shape'].tolist()}, expected {[m, n]}")
    offset = 2 ** (bits - 1) if held < 8 else 0  # codes of 8 bits stay signed: an int8 product has no other

    def codes(plane: int, rows: slice) -> Tensor:
        signed = unpack_rows(parts["packed"][rows].to(device), bits, n)
        return (signed + offset).view(torch.uint8)

    words = _pack_planes(codes, (1, m, n), held, run, offset, device)
    scale, zero = parts["scale"][None].to(device), None
    if scale.dtype == torch.float32 and torch.equal(scale.half().float(), scale):
        scale = scale.half()
    if not spec["symmetric"]:
        zero = unpack_rows(parts["zero_point"].T, bits, m).T[None].to(device).contiguous() + offset
    return Planes(words, scale.contiguous(), zero, offset, held, run, spec["group"], n, parse_dtype(spec["dtype"]))


def _pack_planes(
    codes: Callable[[int, slice], Tensor],
    shape: tuple[int, int, int],
    bits: int,
    run: int,
    fill: int,
    device: torch.device | str,
) -> Tensor:
    """Return the words of ``codes(plane, rows)``, uint8 (rows, n), for all planes and rows."""
    planes, m, n = shape
    fields = 8 // bits
    short = -n % max(fields * run, ACTIVATION_GROUP)
    words = torch.empty(planes, m, (n + short) // fields // 4, dtype=torch.int32, device=device)
    for plane in range(planes):
        for rows in row_slices(m, n):
            padded = torch.nn.functional.pad(codes(plane, rows), (0, short), value=fill)
            words[plane, rows] = pack_fields(padded, bits, run)
    return words


def row_slices(m: int, n: int) -> Iterator[slice]:
    """Yield slices that cover ``m`` rows of ``n`` weights, about `ROWS_CHUNK` weights each."""
    step = max(1, ROWS_CHUNK // max(1, n))
    for start in range(0, m, step):
        yield slice(start, min(m, start + step))


def pack_fields(codes: Tensor, bits: int, run: int) -> Tensor:
    """Pack uint8 codes (m, k), k a multiple of ``8 / bits * run``: int32 (m, k bits / 32)."""
    fields = 8 // bits
    blocks = codes.view(codes.shape[0], -1, fields, run)
    packed = blocks[:, :, 0].clone()
    for field in range(1, fields):
        packed |= blocks[:, :, field] << (bits * field)
    return packed.flatten(1).view(torch.int32)


def unpack_fields(words: Tensor, bits: int, run: int) -> Tensor:
    """Return codes (m, k): the inverse of `pack_fields`, uint8, or for 8 bits int8."""
    packed = words.contiguous().view(torch.uint8).view(words.shape[0], -1, 1, run)
    if bits == 8:
        return packed.flatten(1).view(torch.int8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    codes: Tensor = (packed >> shifts[:, None]) & (2**bits - 1)
    return codes.flatten(1)
