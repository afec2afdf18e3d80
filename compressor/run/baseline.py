"""The yardstick: every linear rounded to the nearest on a plain integer grid of at most as many bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.engine.skeleton import Linear
from compressor.formats import Dense, Sum
from compressor.methods.rtn import bits_for_budget, bits_per_weight, round_to_nearest
from compressor.run.transform import BlockWork


def baseline_weight(work: BlockWork, linear: Linear) -> tuple[Tensor, dict[str, Any]]:
    """Return the baseline's weight (out, in) for a linear, and its bits.

    A linear that was left alone is left alone here as well, as is one that a residual makes whole. Where even two bits
    need more bytes than the compressed matrix has, two bits are taken, and the facts say so: the baseline is then the
    larger one.
    """
    original = work.unfolded.get(f"{linear.name}.weight", work.originals[linear.name]).to(torch.float32)
    code = work.weights[linear.name]
    untouched = isinstance(code, Dense) and f"{linear.name}.weight" not in work.narrow
    if untouched or (isinstance(code, Sum) and isinstance(code.base, Dense)):
        size = original.numel() * linear.dtype.itemsize
        return original, {"bits": 8 * linear.dtype.itemsize, "bytes": size, "over": False, "group": None}
    n = linear.shape[1]
    grid = bits_for_budget(work.layers[linear.name]["bits_per_weight"], n)
    bits, group = grid or (2, None)
    size = round(bits_per_weight(bits, group, n) * original.numel() / 8)
    return round_to_nearest(original, bits, group), {"bits": bits, "bytes": size, "over": grid is None, "group": group}
