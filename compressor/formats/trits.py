"""A stream of trits, the numbers -1, 0 and 1, five to a byte: 1.6 bits each where log2 3 = 1.585 would be the least.

The trits t_0 .. t_4 of a byte are the digits t + 1 of a number in base 3, the first the lowest:

    byte = (t_0 + 1) + 3 (t_1 + 1) + 9 (t_2 + 1) + 27 (t_3 + 1) + 81 (t_4 + 1),    0 <= byte <= 242
"""

from __future__ import annotations

import torch
from torch import Tensor

TRITS_PER_BYTE = 5
TRIT_BYTES = 3**TRITS_PER_BYTE


def pack_trits(trits: Tensor) -> Tensor:
    """Pack trits five to a byte.

    Args:
        trits: int8, any shape, read in row-major order, each -1, 0 or 1.

    Returns:
        uint8 (ceil(numel / 5),); the unused digits of the last byte stand for the trit 0.

    Raises:
        ValueError: another value than -1, 0 or 1.
    """
    flat = trits.reshape(-1)
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) > 1):
        raise ValueError(f"trits from {int(flat.min())} to {int(flat.max())}: expected -1, 0 or 1")
    short = -flat.numel() % TRITS_PER_BYTE
    digits = (torch.cat([flat, flat.new_zeros(short)]) if short else flat).view(-1, TRITS_PER_BYTE)
    packed = torch.zeros(digits.shape[0], dtype=torch.uint8, device=flat.device)
    for digit in reversed(range(TRITS_PER_BYTE)):
        packed.mul_(3).add_((digits[:, digit] + 1).view(torch.uint8))
    return packed


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` trits, int8 (count,): the inverse of :func:`pack_trits`.

    Raises:
        ValueError: a byte above 242, which packing cannot have written.
    """
    if packed.numel() and int(packed.max()) >= TRIT_BYTES:
        raise ValueError(f"a byte of trits is {int(packed.max())}, above {TRIT_BYTES - 1}")
    numbers = torch.arange(TRIT_BYTES, device=packed.device)
    digits = torch.stack([numbers // 3**digit % 3 - 1 for digit in range(TRITS_PER_BYTE)], dim=1)
    return digits.to(torch.int8).index_select(0, packed.int()).view(-1)[:count]
