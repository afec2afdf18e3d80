"""``--planes auto``: which matrices want a number of trit planes, what each number costs, and what fits the budget."""

from __future__ import annotations

import re
from math import prod

from compressor.engine.skeleton import Linear
from compressor.formats import nbytes
from compressor.formats.parts import dtype_name
from compressor.methods.plane_budget import choose_planes
from compressor.methods.quantize_settings import TritPlanesSettings
from compressor.methods.quantizers import foresee
from compressor.run.recipe import Stage

PLANES = (1, 2, 3)


def automatic(stage: Stage, linears: tuple[Linear, ...]) -> list[Linear]:
    """The matrices whose number of planes is to be found."""
    return [x for x in linears if getattr(stage.settings_of(x.name), "planes", None) == "auto"]


def plane_bits(stage: Stage, linear: Linear) -> dict[int, float]:
    """Number of planes -> bits of the matrix, scales and padding included."""
    shape, dtype = linear.shape, dtype_name(linear.dtype)
    return {k: 8.0 * nbytes(foresee(stage.name, with_planes(stage, linear.name, k), shape, dtype)) for k in PLANES}


def with_planes(stage: Stage, name: str, planes: int) -> TritPlanesSettings:
    """The settings of a matrix once its number of planes is known."""
    settings = stage.settings_of(name)
    assert isinstance(settings, TritPlanesSettings)
    return settings.model_copy(update={"planes": planes, "bpw": None})


def settled(stage: Stage, planes: dict[str, int]) -> Stage:
    """The stage with the numbers of planes found (linear name -> planes) as overrides of single matrices."""
    special = [(f"^{re.escape(name)}$", with_planes(stage, name, number)) for name, number in planes.items()]
    return stage.model_copy(update={"overrides": (*special, *stage.overrides)}) if special else stage


def budget_bits(stage: Stage, linears: list[Linear]) -> float:
    """Bits that the stage's ``bpw`` allows for these matrices."""
    bpw = getattr(stage.settings, "bpw", None)
    assert bpw is not None  # settings with planes "auto" and without bpw are refused
    return float(bpw) * sum(prod(linear.shape) for linear in linears)


def too_few_bits(stage: Stage, linears: tuple[Linear, ...]) -> list[str]:
    """What stands against the budget: not even one plane everywhere fits."""
    if not (chosen := automatic(stage, linears)):
        return []
    least = sum(plane_bits(stage, linear)[1] for linear in chosen)
    if least <= budget_bits(stage, chosen):
        return []
    weights = sum(prod(linear.shape) for linear in chosen)
    return [f"one trit plane takes {least / weights:.3f} bits a weight with its scales, more than --bpw allows"]


def foreseen_planes(stage: Stage, linears: tuple[Linear, ...]) -> Stage:
    """The stage as it might be settled: every plane spares as much as any other of its number. For the plan's bytes."""
    chosen = automatic(stage, linears)
    if not chosen or too_few_bits(stage, linears):
        return settled(stage, {linear.name: 1 for linear in chosen})
    errors = [{k: float(prod(linear.shape)) * 6.0**-k for k in PLANES} for linear in chosen]
    planes = choose_planes(errors, [plane_bits(stage, x) for x in chosen], budget_bits(stage, chosen))
    return settled(stage, {linear.name: number for linear, number in zip(chosen, planes, strict=True)})
