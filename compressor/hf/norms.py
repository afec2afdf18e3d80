"""RMS norms of models by the kernels: what a module computes is found out by comparing, and only then taken over."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels.norm import Formula, can_normalize, rms_norm

ROWS = (0.01, 0.3, 1.0, 30.0)
"""Sizes of the numbers by which formulas are told apart: of the first it matters what is added to their squares."""


def formula_of(module: nn.Module, level: str) -> Formula | None:
    """Return what a module computes, if it is an RMS norm: found out by comparing.

    Args:
        module: of any model.
        level: instruction set.

    Returns:
        None where no formula gives what the module does, but for one number in a hundred that is rounded otherwise.
    """
    weight: Any = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    if [id(parameter) for parameter in module.parameters()] != [id(weight)]:
        return None
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(len(ROWS), weight.numel(), generator=g) * torch.tensor(ROWS)[:, None]).to(weight.dtype)
    with torch.no_grad():
        if weight.ndim != 1 or not can_normalize(x, weight):
            return None
        try:
            want = type(module).forward(module, x)
        except (TypeError, ValueError, RuntimeError):
            return None  # something that wants more than a tensor, or another shape
        if not isinstance(want, Tensor) or want.shape != x.shape or want.dtype != x.dtype:
            return None
        for more in (False, True):
            for rounded in (True, False):
                found = Formula(eps, more, rounded)
                if _alike(rms_norm(x, weight, found, level), want):
                    return found
    return None


def _alike(found: Tensor, want: Tensor) -> bool:
    """Whether numbers are the same; in 16 bits, all but one in a hundred to the bit."""
    bits = torch.finfo(want.dtype).eps
    close = torch.allclose(found.float(), want.float(), rtol=max(2 * bits, 1e-5), atol=0)
    return close and (want.dtype == torch.float32 or float((found != want).float().mean()) <= 0.01)


def forward(module: nn.Module, formula: Formula, level: str, *args: Any, **kwargs: Any) -> Any:
    """What a module does with one tensor that `rms_norm` takes; everything else is its own."""
    weight: Any = module.weight
    if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and can_normalize(args[0], weight):
        return rms_norm(args[0], weight, formula, level)
    return type(module).forward(module, *args, **kwargs)


def quicken_norms(model: nn.Module, level: str | None) -> None:
    """Let the norms of a model be computed by the kernels; with None, by the modules themselves again."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func is forward:
            del module.forward
            own = None
        if level is None or own is not None or not type(module).__name__.endswith("RMSNorm"):
            continue
        formula = formula_of(module, level)
        if formula is not None:
            module.forward = partial(forward, module, formula, level)
