"""Round to nearest: symmetric integers with one scale per group. The equal-bytes baseline of every report."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = (64, 128)
SCALE_BITS = 16


def round_to_nearest(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """Return ``weight`` (m, n) fp32 on a symmetric grid of 2^bits levels, with an fp16 scale per ``group`` inputs.

    Codes run from -2^(bits-1) to 2^(bits-1) - 1, and the scale is max|w| / (2^bits - 1) * 2: half a step beyond the
    largest code on either side, the convention of compressed-tensors. ``group`` None is the whole row; the last group
    of a row may be shorter.
    """
    m, n = weight.shape
    width = n if group is None else min(group, n)
    padded = torch.nn.functional.pad(weight.float(), (0, -n % width)).view(m, -1, width)
    top = 2 ** (bits - 1)
    largest = torch.finfo(torch.float16).max
    scale = (padded.abs().amax(2, keepdim=True) * 2 / (2**bits - 1)).clamp(2.0**-24, largest).half().float()
    codes = (padded / scale).round_().clamp_(-top, top - 1)
    rounded: Tensor = codes.mul_(scale).view(m, -1)[:, :n].contiguous()
    return rounded


def bits_per_weight(bits: int, group: int | None, n: int) -> float:
    """Return the true bits per weight of rows of ``n`` inputs, scales included."""
    groups = 1 if group is None else -(-n // group)
    return bits + SCALE_BITS * groups / n


def bits_for_budget(bpw: float, n: int) -> tuple[int, int | None] | None:
    """Return (bits, group) that spend at most ``bpw`` bits per weight on rows of ``n`` inputs.

    The largest bits from 8 to 2, and for these the smallest group of 64, 128 or the row (None). None when 2 bits with
    one scale per row are too many.
    """
    for bits in range(8, 1, -1):
        for group in (*(g for g in GROUPS if g < n), None):
            if bits_per_weight(bits, group, n) <= bpw:
                return bits, group
    return None
