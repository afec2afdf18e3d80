"""N kept of every M consecutive inputs: the kept values, and for each group the rank of its set of positions.

The rank is that of the N-subset {c_1 < ... < c_N} of {0 .. M-1} in the combinatorial number system (Lehmer;
Knuth, The Art of Computer Programming 4A, section 7.2.1.3):

    rank = C(c_1, 1) + C(c_2, 2) + ... + C(c_N, N),    0 <= rank < B = C(M, N)

so a group costs log2 B bits instead of the M of a bitmask. k ranks make one word r_0 + r_1 B + ... + r_{k-1} B^(k-1)
of w bytes, lowest byte first; (w, k) is the pair of fewest bits a group with w <= 8 and B^k <= 2^63, so that nothing
overflows int64. 2:4 puts 3 groups into a byte (2.67 bits each, of log2 6 = 2.58), 4:8 puts 9 into 7 bytes
(6.22 of log2 70 = 6.13).

A group that keeps fewer than N entries is filled up with its lowest positions that are not kept, holding +0.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb

import torch
from torch import Tensor

from compressor.formats.parts import Layout, Spec, check_mask, check_parts, matrix_shape, parse_dtype

NM_LARGEST_GROUP = 32
NM_CHUNK = 1 << 18
"""Groups handled at once, so that their int64 intermediates stay in cache and small beside the matrix."""


def pack_nm(weight: Tensor, mask: Tensor, n: int, m: int) -> dict[str, Tensor]:
    """Pack a matrix of which at most n of every m consecutive inputs are kept.

    Args:
        weight: (rows, columns), any dtype of ``WEIGHT_DTYPES``.
        mask: (rows, columns) bool, True = kept.
        n: kept entries a group.
        m: entries a group, at most 32; divides the columns.

    Returns:
        ``values`` (rows, columns / m * n) in the dtype of ``weight``; ``index`` uint8.

    Raises:
        ValueError: m does not divide the columns, or a group keeps more than n.
    """
    check_mask(weight, mask)
    rows, columns = weight.shape
    _check_pattern(n, m, columns)
    groups = mask.reshape(-1, m)
    counts = groups.sum(dim=1, dtype=torch.uint8)
    if counts.numel() and int(counts.max()) > n:
        group = int(counts.argmax())
        row, column = divmod(group * m, columns)
        raise ValueError(f"{int(counts[group])} entries are kept from ({row}, {column}) on, where {n}:{m} allows {n}")
    short = torch.nonzero(counts < n).view(-1)
    if short.numel():
        weight = weight.masked_fill(~mask, 0)
        groups = groups.clone()
        groups[short] = _fill_up(groups[short], n - counts[short])
    values = torch.masked_select(weight, groups.view(rows, columns))
    return {"values": values.view(rows, columns // m * n), "index": _pack_ranks(groups, n, m)}


def unpack_nm(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (rows, columns) in the spec's dtype; ValueError names a part that does not fit the spec."""
    check_parts(parts, layout_nm(spec), "nm")
    values = parts["values"]
    weight = values.new_zeros(matrix_shape(spec))
    return weight.masked_scatter_(nm_kept(parts, spec), values)


def nm_kept(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the mask (rows, columns) bool, exactly n of every m: positions that were filled up count as kept."""
    rows, columns = matrix_shape(spec)
    n, m = spec["n"], spec["m"]
    _check_pattern(n, m, columns)
    return _unpack_ranks(parts["index"], rows * columns // m, n, m).view(rows, columns)


def layout_nm(spec: Spec) -> Layout:
    """Return the shapes of ``values`` and ``index``."""
    rows, columns = matrix_shape(spec)
    n, m = spec["n"], spec["m"]
    _check_pattern(n, m, columns)
    width, ranks = nm_word(n, m)
    words = -(-(rows * columns // m) // ranks) if width else 0
    return {
        "values": ((rows, columns // m * n), parse_dtype(spec["dtype"])),
        "index": ((words * width,), torch.uint8),
    }


def nm_word(n: int, m: int) -> tuple[int, int]:
    """Return (bytes of a word, ranks in it) of the fewest bits a rank, the shortest among equals.

    (0, 1) when there is only one subset and nothing has to be said.
    """
    base = comb(m, n)
    if base == 1:
        return 0, 1
    candidates = []
    for width in range(1, 9):
        ranks = 0
        while base ** (ranks + 1) <= 2 ** min(8 * width, 63):
            ranks += 1
        if ranks:
            candidates.append((width / ranks, width, ranks))
    return min(candidates)[1:]


def _check_pattern(n: int, m: int, columns: int) -> None:
    if not 0 < n <= m <= NM_LARGEST_GROUP:
        raise ValueError(f"pattern {n}:{m} needs 0 < N <= M <= {NM_LARGEST_GROUP}")
    if columns % m:
        raise ValueError(f"pattern {n}:{m} does not divide {columns} columns")


def _fill_up(groups: Tensor, missing: Tensor) -> Tensor:
    """Return bool (g, m) with the ``missing`` (g,) lowest unkept positions of each group kept as well."""
    order = (~groups).cumsum(dim=1)
    return groups | (order <= missing[:, None])


def _binomials(n: int, m: int, device: torch.device) -> Tensor:
    """Return int64 (m, n + 1) with C(p, j) at [p, j]."""
    return torch.tensor([[comb(p, j) for j in range(n + 1)] for p in range(m)], device=device)


def _pack_ranks(groups: Tensor, n: int, m: int) -> Tensor:
    """Return the bytes (words * width,) uint8 of the ranks of ``groups`` (g, m) bool, n true in each."""
    width, per_word = nm_word(n, m)
    if not width:
        return torch.empty(0, dtype=torch.uint8, device=groups.device)
    table, base, step = _binomials(n, m, groups.device), comb(m, n), NM_CHUNK * per_word
    packed = []
    for start in range(0, groups.shape[0], step):
        ranks = torch.cat([_rank(chunk, table) for chunk in torch.split(groups[start : start + step], NM_CHUNK)])
        ranks = torch.cat([ranks, ranks.new_zeros(-ranks.numel() % per_word)]).view(-1, per_word)
        word = ranks[:, -1].clone()
        for digit in range(per_word - 2, -1, -1):
            word.mul_(base).add_(ranks[:, digit])
        packed.append(torch.stack([(word >> (8 * byte)) & 255 for byte in range(width)], dim=1).to(torch.uint8))
    return torch.cat(packed).view(-1) if packed else torch.empty(0, dtype=torch.uint8, device=groups.device)


def _unpack_ranks(index: Tensor, count: int, n: int, m: int) -> Tensor:
    """Return bool (count, m); ValueError when a word of ``index`` is none that packing could have written."""
    width, per_word = nm_word(n, m)
    if not width:
        return torch.ones(count, m, dtype=torch.bool, device=index.device)
    table, base = _binomials(n, m, index.device), comb(m, n)
    groups = torch.empty(count, m, dtype=torch.bool, device=index.device)
    for start in range(0, count, NM_CHUNK * per_word):
        first = start // per_word * width
        octets = index[first : first + NM_CHUNK * width].view(-1, width).long()
        word = octets[:, 0].clone()
        for byte in range(1, width):
            word |= octets[:, byte] << (8 * byte)
        if int(word.min()) < 0 or int(word.max()) >= base**per_word:
            raise ValueError(f"part 'index' holds a word that is no {per_word} ranks of {n}:{m}")
        digits = []
        for _ in range(per_word):
            digits.append(word % base)
            word = word // base
        target = groups[start : start + NM_CHUNK * per_word]
        ranks = torch.stack(digits, dim=1).view(-1)[: target.shape[0]]
        for chunk, rank in zip(torch.split(target, NM_CHUNK), torch.split(ranks, NM_CHUNK), strict=True):
            _unrank(rank, table, chunk)
    return groups


def _rank(groups: Tensor, table: Tensor) -> Tensor:
    """Return int64 (g,), the rank of each row of ``groups`` (g, m) bool; ``table`` from :func:`_binomials`."""
    seen = torch.zeros(groups.shape[0], dtype=torch.int64, device=groups.device)
    rank = torch.zeros_like(seen)
    for p in range(groups.shape[1]):
        kept = groups[:, p]
        seen += kept
        rank += table[p].index_select(0, seen) * kept
    return rank


def _unrank(rank: Tensor, table: Tensor, target: Tensor) -> None:
    """Write the subsets of ``rank`` (g,) int64 into ``target`` (g, m) bool: the largest position first, greedily."""
    left = torch.full_like(rank, table.shape[1] - 1)
    rank = rank.clone()
    for p in range(target.shape[1] - 1, -1, -1):
        weight = table[p].index_select(0, left)
        kept = weight <= rank  # once left is 0 so is the rank, and C(p, 0) = 1 keeps nothing more
        rank -= weight * kept
        left -= kept.long()
        target[:, p] = kept
