"""What a stage will store for a matrix, from its settings and its shape alone; and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from compressor.engine.skeleton import Linear
from compressor.formats import nbytes
from compressor.formats.parts import dtype_name
from compressor.methods.decompose_settings import DecomposeSettings
from compressor.methods.decomposers import foresee_low_rank
from compressor.methods.masks import count
from compressor.methods.quantize_settings import QuantizeSettings
from compressor.methods.quantizers import foresee, foresee_factors_of
from compressor.methods.settings import PruneSettings
from compressor.run.recipe import WITHOUT_ZERO, Stage, not_for_factors

LEARNED_BYTES = 32
"""A weight that learns: its parameter, gradient, two moments, the best value so far, and what its learner holds."""

SAVED_BYTES = 16
"""The same on disk: parameter, moments, best value."""

MASKS = ("bitmask", "nm")
"""Formats whose values can be worked on: a mask, and the kept weights as they were."""


def foreseen_spec(
    stage: Stage, linear: Linear, before: Mapping[str, Any] | None = None, rank: int | None = None
) -> dict[str, Any]:
    """Manifest entry of a linear after a stage. Sizes that depend on the values are estimated.

    Args:
        before: its entry before the stage; None for a dense matrix.
        rank: of a decomposing stage; None where the matrix stays whole.
    """
    settings = stage.settings_of(linear.name)
    if isinstance(settings, DecomposeSettings):
        if rank is None and before is not None:
            return dict(before)
        return foresee_low_rank(settings, linear.shape, dtype_name(linear.dtype), rank)
    if isinstance(settings, QuantizeSettings) and before is not None and before["format"] == "low-rank":
        return foresee_factors_of(stage.name, settings, before)
    if isinstance(settings, QuantizeSettings):
        return foresee(stage.name, settings, linear.shape, dtype_name(linear.dtype))
    assert isinstance(settings, PruneSettings)  # linearizing changes no matrix
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


def other_groups(stage: Stage, linears: Sequence[Linear], specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is to be known of the groups that a stage was asked for: some matrices cannot have them.

    Args:
        specs: manifest entries after the stage.
    """
    asked = getattr(stage.settings, "group", None)
    if not isinstance(stage.settings, QuantizeSettings) or "group" not in stage.settings.model_fields_set:
        return []
    found: dict[int, set[int]] = {}
    for linear in linears:
        spec = specs[linear.name].get("base", specs[linear.name])
        own, n = spec.get("group", asked), linear.shape[1]
        if isinstance(asked, int) and stage.settings_of(linear.name) is stage.settings and own != asked < n:
            found.setdefault(own, set()).add(n)
    return [
        f"groups of {asked} do not divide {' and '.join(map(str, sorted(inputs)))} inputs: groups of {own} are stored"
        for own, inputs in sorted(found.items())
    ]


def violations(stage: Stage, linear: Linear, packed: Mapping[str, Any] | None, *, first: bool) -> list[str]:
    """Rules that a stage breaks on a linear.

    Args:
        packed: manifest entry of the linear in a source that compressor has written.
        first: whether the stage is the recipe's first, so that it meets the source itself.
    """
    if packed is not None and packed["format"] == "low-rank" and first:
        return _against_factors(stage, linear, packed)
    if packed is not None and packed["format"] == "sum" and packed["base"]["format"] == "dense":
        return [
            f"{linear.name} is a product beside its residual; split it off with compressor adapter, and start from "
            "what is left"
        ]
    if packed is not None and packed["format"] not in MASKS:
        done = {"prune": "pruned", "quantize": "quantized again", "decompose": "decomposed"}[stage.kind]
        return [f"{linear.name} is already quantized ({packed['format']}) and cannot be {done}; start from its source"]
    settings = stage.settings_of(linear.name)
    if isinstance(settings, DecomposeSettings):
        return []
    if isinstance(settings, QuantizeSettings):
        if packed is not None and (stage.name in WITHOUT_ZERO or settings.correct):
            what = stage.name if stage.name in WITHOUT_ZERO else "a corrected code"
            return [f"{linear.name} is pruned, and {what} cannot say zero; start from its source, or use plain gptq"]
        return []
    assert isinstance(settings, PruneSettings)
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


def _against_factors(stage: Stage, linear: Linear, packed: Mapping[str, Any]) -> list[str]:
    """Rules that a stage breaks on a matrix that the source holds as a product."""
    if stage.kind != "quantize":
        return [f"{linear.name} is already decomposed and cannot be {stage.kind}d; start from its source"]
    if "dense" not in (packed["left"]["format"], packed["right"]["format"]):
        return [f"{linear.name} is already decomposed, its factors are integers; start from its source"]
    why = not_for_factors(stage)
    return [f"{linear.name} is decomposed: {why}; --method gptq, without extras"] if why else []


def learned_bytes(stage: Stage, linears: Sequence[Linear]) -> tuple[int, int]:
    """What learning end to end keeps in memory, and what it puts on disk (also while it writes that anew)."""
    weights = sum(prod(linear.shape) for linear in linears) if stage.end_to_end else 0
    return LEARNED_BYTES * weights, 2 * SAVED_BYTES * weights


def _zero_share(spec: Mapping[str, Any]) -> float:
    """Fraction of zeros that a manifest entry promises."""
    if spec["format"] == "nm":
        return float(1 - spec["n"] / spec["m"])
    return float(1 - spec["nnz"] / prod(spec["shape"])) if "nnz" in spec else 0.0
