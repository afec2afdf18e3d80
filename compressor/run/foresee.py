"""What a stage will store for a matrix, from its settings and its shape alone; and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from compressor.engine.skeleton import Linear
from compressor.formats import nbytes
from compressor.formats.parts import dtype_name
from compressor.methods.masks import count
from compressor.methods.quantizers import foresee
from compressor.methods.settings import PruneSettings
from compressor.run.recipe import WITHOUT_ZERO, Stage

MASKS = ("bitmask", "nm")
"""Formats whose values can be worked on: a mask, and the kept weights as they were."""


def foreseen_spec(stage: Stage, linear: Linear) -> dict[str, Any]:
    """Manifest entry of a linear after a stage. Sizes that depend on the values are estimated."""
    settings = stage.settings_of(linear.name)
    if not isinstance(settings, PruneSettings):
        return foresee(stage.name, settings, linear.shape, dtype_name(linear.dtype))
    m, n = linear.shape
    common: dict[str, Any] = {"shape": [m, n], "dtype": dtype_name(linear.dtype)}
    if settings.group is not None:
        kept, group = settings.group
        nnz = m * n // group * kept
        sparse: list[dict[str, Any]] = [{"format": "nm", **common, "n": kept, "m": group}] if n % group == 0 else []
    else:
        nnz = m * n - count(settings.sparsity or 0.0, m * n)
        sparse = []
    if (bits := getattr(settings, "bits", None)) is not None:
        return {"format": "sparse-int", **common, "nnz": nnz, "bits": bits}
    candidates = [{"format": "dense", **common}, {"format": "bitmask", **common, "nnz": nnz}, *sparse]
    return min(candidates, key=nbytes)


def violations(stage: Stage, linear: Linear, packed: Mapping[str, Any] | None, *, first: bool) -> list[str]:
    """Rules that a stage breaks on a linear.

    Args:
        packed: manifest entry of the linear in a source that compressor has written.
        first: whether the stage is the recipe's first, so that it meets the source itself.
    """
    if packed is not None and packed["format"] not in MASKS:
        done = {"prune": "pruned", "quantize": "quantized again"}[stage.kind]
        return [f"{linear.name} is already quantized ({packed['format']}) and cannot be {done}; start from its source"]
    settings = stage.settings_of(linear.name)
    if not isinstance(settings, PruneSettings):
        if packed is not None and (stage.name in WITHOUT_ZERO or settings.correct):
            what = stage.name if stage.name in WITHOUT_ZERO else "a corrected code"
            return [f"{linear.name} is pruned, and {what} cannot say zero; start from its source, or use plain gptq"]
        return []
    found = []
    n = linear.shape[1]
    if (group := settings.group) is not None and n % group[1]:
        found.append(
            f"pattern {settings.pattern} does not divide the {n} inputs of {linear.kind}; "
            f"choose an M that divides {n}, or --exclude '{re.escape(linear.kind)}'"
        )
    if packed is None or not first or (group is not None and packed["format"] != "nm"):
        return found  # any mask can be made N:M
    if (zeros := _zero_share(packed)) >= settings.share:
        found.append(
            f"{linear.name} is already pruned to {zeros:.1%}, and the recipe asks for {settings.share:.1%}; "
            "ask for more, or start from its source"
        )
    return found


def _zero_share(spec: Mapping[str, Any]) -> float:
    """Fraction of zeros that a manifest entry promises."""
    if spec["format"] == "nm":
        return float(1 - spec["n"] / spec["m"])
    return float(1 - spec["nnz"] / prod(spec["shape"])) if "nnz" in spec else 0.0
