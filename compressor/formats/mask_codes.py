"""Where a few entries of a matrix stand, in about as many bits as the entropy of their positions.

The matrix is read row by row ("rows") or column by column ("columns") and cut into chunks of 64 positions, the last one
filled up with unmarked ones. A chunk with k marks at c_1 < ... < c_k has, in the combinatorial number system, the rank

    C(c_1, 1) + C(c_2, 2) + ... + C(c_k, k) < C(64, k)

which is written in ceil(log2 C(64, k)) bits. The counts k are Rice coded with parameter b: the lowest b bits as is,
then k >> b in unary (that many zeros, and a one). The three streams follow each other, each beginning on a byte and
little-endian: low bits of the counts, their unary parts, ranks. Nothing but the number of marks and b is needed to find
where each begins, and all chunks are decoded at once.

A fraction p of marks, scattered evenly, costs H2(p) + 0.02 bits a position; uneven counts cost less.
"""

from __future__ import annotations

from functools import cache
from math import ceil, comb
from typing import Any

import torch
from torch import Tensor

from compressor.formats.bits import pack_bits, pack_codes, unpack_bits, unpack_codes
from compressor.formats.parts import Spec, matrix_shape

MASK_CHUNK = 64
MASK_RANK_BITS = 61
"""Of the largest rank: ceil(log2 C(64, 32))."""
MASK_SLAB = 1 << 15
"""Chunks handled at once, so that their int64 intermediates stay small beside the matrix."""
MOST_RICE_BITS = 6

MASK_CODES = ("none", "all", "inputs", "bitmap", "rows", "columns")
"""Nothing and everything marked, which takes no bytes; whole columns, one bit each; one bit an entry; ranks, by rows or
by columns."""


def cheapest_mask(mask: Tensor) -> dict[str, Any]:
    """Return what a spec says of ``mask`` (m, n) bool: ``nnz``, and the ``mask`` code of fewest bytes.

    With ranks also ``rice``, the b of the counts, and ``mask_bytes``. Of equals, the first in `MASK_CODES`.
    """
    m, n = mask.shape
    nnz = int(torch.count_nonzero(mask))
    if nnz in (0, m * n):
        return {"nnz": nnz, "mask": "all" if nnz else "none"}
    if torch.equal(mask, mask[:1].expand(m, n)):
        return {"nnz": nnz, "mask": "inputs"}
    candidates: list[dict[str, Any]] = [{"nnz": nnz, "mask": "bitmap"}]
    for code in ("rows", "columns"):
        counts = mask_chunks(mask, code).sum(dim=1)
        rice, length = _best_rice(counts)
        candidates.append({"nnz": nnz, "mask": code, "rice": rice, "mask_bytes": length})
    return min(candidates, key=lambda candidate: mask_nbytes(m, n, candidate))


def pack_mask(mask: Tensor, fields: Spec) -> Tensor:
    """Return the bytes, uint8, of ``mask`` (m, n) bool in the code that ``fields`` name, from `cheapest_mask`."""
    code = fields["mask"]
    if code in ("none", "all"):
        return torch.empty(0, dtype=torch.uint8, device=mask.device)
    if code == "inputs":
        return pack_bits(mask[0])
    if code == "bitmap":
        return pack_bits(mask)
    chunks = mask_chunks(mask, code)
    counts = chunks.sum(dim=1)
    rice = fields["rice"]
    low = pack_codes((counts & (2**rice - 1)).to(torch.uint8), rice) if rice else counts.new_empty(0, dtype=torch.uint8)
    ends = ((counts >> rice) + 1).cumsum(0)
    unary = torch.zeros(int(ends[-1]), dtype=torch.bool, device=mask.device)
    unary[ends - 1] = True
    return torch.cat([low, pack_bits(unary), pack_bits(_rank_bits(chunks, counts))])


def unpack_mask(packed: Tensor, spec: Spec) -> Tensor:
    """Return the mask (m, n) bool; ``spec`` holds ``shape`` and what `cheapest_mask` gave.

    Raises:
        ValueError: the bytes do not hold ``nnz`` marks, or are none that packing could have written.
    """
    m, n = matrix_shape(spec)
    code, nnz = spec["mask"], spec["nnz"]
    if code in ("none", "all"):
        mask = torch.full((m, n), code == "all", dtype=torch.bool, device=packed.device)
    elif code == "inputs":
        mask = unpack_bits(packed, n).expand(m, n).contiguous()
    elif code == "bitmap":
        mask = unpack_bits(packed, m * n).view(m, n)
    else:
        flat = _unpack_chunks(packed, -(-m * n // MASK_CHUNK), nnz, spec["rice"]).view(-1)[: m * n]
        mask = flat.view(m, n) if code == "rows" else flat.view(n, m).T.contiguous()
    if (found := int(torch.count_nonzero(mask))) != nnz:
        raise ValueError(f"part 'mask' marks {found} entries, expected {nnz}")
    return mask


def mask_nbytes(m: int, n: int, fields: Spec) -> int:
    """Return the bytes of a mask (m, n) whose spec says ``fields``; ValueError for a code that is none."""
    code = fields["mask"]
    if code not in MASK_CODES:
        raise ValueError(f"mask code {code!r}: expected one of {', '.join(MASK_CODES)}")
    if code in ("rows", "columns"):
        if not 0 <= fields["rice"] <= MOST_RICE_BITS:
            raise ValueError(f"counts with {fields['rice']} bits as they are: expected 0 to {MOST_RICE_BITS}")
        return int(fields["mask_bytes"])
    return {"none": 0, "all": 0, "inputs": -(-n // 8), "bitmap": -(-m * n // 8)}[code]


def foreseen_mask(m: int, n: int, nnz: int) -> dict[str, Any]:
    """Return what `cheapest_mask` will about say of ``nnz`` marks scattered evenly, from their number alone."""
    if nnz in (0, m * n):
        return {"nnz": nnz, "mask": "all" if nnz else "none"}
    chunks, p = -(-m * n // MASK_CHUNK), nnz / (m * n)
    chance = [comb(MASK_CHUNK, k) * p**k * (1 - p) ** (MASK_CHUNK - k) for k in range(MASK_CHUNK + 1)]
    costs = []
    for rice in range(MOST_RICE_BITS + 1):
        bits = sum(
            c * (rice + (k >> rice) + 1 + length)
            for k, (c, length) in enumerate(zip(chance, rank_lengths(), strict=True))
        )
        costs.append((ceil(chunks * bits / 8), rice))
    length, rice = min(costs)
    ranks = {"nnz": nnz, "mask": "rows", "rice": rice, "mask_bytes": length}
    return min({"nnz": nnz, "mask": "bitmap"}, ranks, key=lambda fields: mask_nbytes(m, n, fields))


@cache
def rank_lengths() -> tuple[int, ...]:
    """Return for k = 0 .. 64 the bits in which the rank of a chunk with k marks is written."""
    return tuple((comb(MASK_CHUNK, k) - 1).bit_length() for k in range(MASK_CHUNK + 1))


def mask_chunks(mask: Tensor, code: str) -> Tensor:
    """Return ``mask`` (m, n) bool as chunks (ceil(mn / 64), 64) in the reading order of ``code``."""
    flat = (mask if code == "rows" else mask.T).reshape(-1)
    return torch.cat([flat, flat.new_zeros(-flat.numel() % MASK_CHUNK)]).view(-1, MASK_CHUNK)


def _best_rice(counts: Tensor) -> tuple[int, int]:
    """Return (b, bytes of all three streams) for the b of fewest bytes, the smallest among equals."""
    ranks = int(torch.tensor(rank_lengths(), device=counts.device)[counts].sum())
    totals = []
    for rice in range(MOST_RICE_BITS + 1):
        unary = int((counts >> rice).sum()) + counts.numel()
        totals.append((-(-rice * counts.numel() // 8) + -(-unary // 8) + -(-ranks // 8), rice))
    length, rice = min(totals)
    return rice, length


def _rank_table(device: torch.device) -> Tensor:
    """Return int64 (64, 65) with C(p, j) at [p, j]."""
    return torch.tensor([[comb(p, j) for j in range(MASK_CHUNK + 1)] for p in range(MASK_CHUNK)], device=device)


def _rank_bits(chunks: Tensor, counts: Tensor) -> Tensor:
    """Return bool: the ranks of all ``chunks`` (c, 64) with ``counts`` (c,), lowest bit first, each in its length."""
    table, lengths = _rank_table(chunks.device), torch.tensor(rank_lengths(), device=chunks.device)
    digits = torch.arange(MASK_RANK_BITS, device=chunks.device)
    bits = []
    for part, count in zip(torch.split(chunks, MASK_SLAB), torch.split(counts, MASK_SLAB), strict=True):
        seen, rank = torch.zeros_like(count), torch.zeros_like(count)
        for p in range(MASK_CHUNK):
            marked = part[:, p]
            seen += marked
            rank += table[p].index_select(0, seen) * marked
        bits.append((((rank[:, None] >> digits) & 1) > 0)[digits < lengths[count][:, None]])
    return torch.cat(bits)


def _unpack_chunks(packed: Tensor, number: int, nnz: int, rice: int) -> Tensor:
    """Return bool (number, 64), the inverse of the second half of `pack_mask`; ValueError as in `unpack_mask`."""
    counts, ranks = _unpack_counts(packed, number, nnz, rice)
    lengths = torch.tensor(rank_lengths(), device=packed.device)
    table, digits = _rank_table(packed.device), torch.arange(MASK_RANK_BITS, device=packed.device)
    bits = unpack_bits(ranks, 8 * ranks.numel())
    chunks = torch.zeros(number, MASK_CHUNK, dtype=torch.bool, device=packed.device)
    at = 0
    for part, count in zip(torch.split(chunks, MASK_SLAB), torch.split(counts, MASK_SLAB), strict=True):
        used = digits < lengths[count][:, None]
        taken = int(used.sum())
        digit = torch.zeros_like(used).masked_scatter_(used, bits[at : at + taken])
        at += taken
        rank = (digit.long() << digits).sum(dim=1)
        left = count.clone()
        for p in range(MASK_CHUNK - 1, -1, -1):
            weight = table[p].index_select(0, left)
            marked = (weight <= rank) & (left > 0)
            rank -= weight * marked
            left -= marked.long()
            part[:, p] = marked
        if bool(rank.any()) or bool(left.any()):
            raise ValueError("part 'mask' holds a rank that is none")
    return chunks


def _unpack_counts(packed: Tensor, number: int, nnz: int, rice: int) -> tuple[Tensor, Tensor]:
    """Return the marks of every chunk, (number,) int64, and the bytes that follow; ValueError as in `unpack_mask`."""
    start = -(-number * rice // 8)
    low = torch.zeros(number, dtype=torch.int64, device=packed.device)
    if rice:
        low += unpack_codes(packed[:start], rice, number)
    unary_bits = max(0, number + ((nnz - int(low.sum())) >> rice))
    end = start + -(-unary_bits // 8)
    if end > packed.numel():
        raise ValueError("part 'mask' is too short for the counts of its chunks")
    ones = unpack_bits(packed[start:end], unary_bits).nonzero().view(-1)
    if ones.numel() != number:
        raise ValueError(f"part 'mask' holds {ones.numel()} counts, expected {number}")
    counts = low + ((torch.diff(ones, prepend=ones.new_full((1,), -1)) - 1) << rice)
    lengths = torch.tensor(rank_lengths(), device=packed.device)
    if int(counts.max()) > MASK_CHUNK or -(-int(lengths[counts].sum()) // 8) != packed.numel() - end:
        raise ValueError("part 'mask' holds counts that do not belong to its length")
    return counts, packed[end:]
