"""Dense streams of small numbers: one bit, or b bits, each. Little-endian everywhere: entry 0 is in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Entries handled at once, so that intermediates stay small beside the matrix. A multiple of 8."""


def pack_bits(flags: Tensor) -> Tensor:
    """Pack booleans eight to a byte.

    Args:
        flags: bool, any shape, read in row-major order.

    Returns:
        uint8 (ceil(numel / 8),); the unused high bits of the last byte are zero.
    """
    flat = flags.reshape(-1)
    packed = flat.new_empty(-(-flat.numel() // 8), dtype=torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        octets = _in_eights(flat[start : start + CHUNK].view(torch.uint8))
        target = packed[start // 8 : start // 8 + octets.shape[0]]
        target.copy_(octets[:, 0])
        for bit in range(1, 8):
            target.bitwise_or_(octets[:, bit] << bit)
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` booleans of ``packed`` (uint8): the inverse of :func:`pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    # eight booleans travel as one int64: one lookup a byte
    octets = (torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None] >> shifts) & 1
    return octets.view(torch.int64).reshape(256).index_select(0, packed.int()).view(torch.bool)[:count]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack ``bits``-bit numbers without gaps: eight numbers to ``bits`` bytes.

    Args:
        codes: uint8 (k,), each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8 (ceil(k * bits / 8),).

    Raises:
        ValueError: a code does not fit.
    """
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes.clone()
    octets = _in_eights(codes)
    packed = codes.new_empty(octets.shape[0], bits)
    for start in range(0, octets.shape[0], CHUNK // 8):
        chunk = octets[start : start + CHUNK // 8].long()
        word = chunk[:, 0].clone()
        for i in range(1, 8):
            word |= chunk[:, i] << (bits * i)  # at most 56 bits
        for byte in range(bits):
            packed[start : start + CHUNK // 8, byte] = (word >> (8 * byte)) & 255
    return packed.reshape(-1)[: -(-codes.numel() * bits // 8)]


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` numbers, uint8 (count,): the inverse of :func:`pack_codes`."""
    if bits == 8:
        return packed[:count].clone()
    words = -(-count // 8)
    octets = packed.new_zeros(words * bits)
    octets[: packed.numel()] = packed
    octets = octets.view(words, bits)
    codes = packed.new_empty(words, 8)
    for start in range(0, words, CHUNK // 8):
        chunk = octets[start : start + CHUNK // 8].long()
        word = chunk[:, 0].clone()
        for byte in range(1, bits):
            word |= chunk[:, byte] << (8 * byte)
        for i in range(8):
            codes[start : start + CHUNK // 8, i] = (word >> (bits * i)) & (2**bits - 1)
    return codes.reshape(-1)[:count]


def _in_eights(flat: Tensor) -> Tensor:
    """Return ``flat`` as (ceil(k / 8), 8), zero-padded at the end; a view when nothing has to be padded."""
    short = -flat.numel() % 8
    return (torch.cat([flat, flat.new_zeros(short)]) if short else flat).view(-1, 8)
