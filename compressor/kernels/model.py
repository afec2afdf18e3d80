"""Make the packed layers of a loaded model fast."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.kernels.layers import Fast, join, make_fast
from compressor.kernels.native import rung_and_why, wanted

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one module that are always called with the same tensor."""

log = logging.getLogger("compressor")


@dataclass(frozen=True)
class Accelerated:
    """What became of a model's packed layers.

    Attributes:
        layers: how many are multiplied in which way.
        joined: how many of them share a call with another one.
        nbytes: of their layouts.
        reasons: why some are not multiplied in the way that was asked for -> how many.
    """

    layers: dict[str, int]
    joined: int
    nbytes: int
    reasons: dict[str, int]

    def __str__(self) -> str:
        """One line."""
        ways = ", ".join(f"{count} by {way}" for way, count in self.layers.items())
        why = "; ".join(f"{count} not: {reason}" for reason, count in self.reasons.items())
        return f"packed layers: {ways or 'none'}{f' ({why})' if why else ''}; {self.nbytes / 1e6:.1f} MB"


def lay_out(model: nn.Module, way: str | None = None) -> Accelerated:
    """Lay out every packed layer on the CPU for the fastest rung there is, once; the outcome is logged.

    Args:
        model: with layers that have ``parts``, ``spec`` and a place ``fast`` (`compressor.hf.linear.PackedLinear`).
        way: rung to use; by default what `native.rung` says.

    Raises:
        UserError: an environment variable asks for what there is not.
    """
    way, why = (way, "asked for") if way else rung_and_why()
    layers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    made: dict[nn.Module, Fast] = {}
    with torch.no_grad():
        for module in model.modules():
            if not (hasattr(module, "fast") and hasattr(module, "parts") and hasattr(module, "spec")):
                continue
            packed: Any = module
            packed.restore()  # what an earlier layout holds alone would be lost with it
            packed.fast = make_fast(packed.parts, packed.spec, way, packed.compute_dtype)
            layers[packed.fast.rung if packed.fast else "packed"] += 1
            if packed.fast is not None:
                packed.release()
                made[module] = packed.fast
                if packed.fast.reason:
                    reasons[packed.fast.reason] += 1
        joined = sum(_join_children(parent, made) for parent in model.modules())
    nbytes = sum(fast.product.nbytes for fast in made.values())
    found = Accelerated(dict(layers), joined, nbytes, dict(reasons))
    if layers:  # what nobody has asked for and is slower than the kernels is worth more than a whisper
        slow = way == "torch" and wanted() == "auto"
        log.log(logging.WARNING if slow else logging.INFO, "%s: %s", found, why)
    return found


def _join_children(parent: nn.Module, made: dict[nn.Module, Fast]) -> int:
    joined = 0
    for names in SHARED_INPUT:
        members = [child for name in names if (child := parent._modules.get(name)) is not None]
        found = [made[child] for child in members if child in made]
        if len(found) == len(names) and join(found):
            joined += len(found)
    return joined
