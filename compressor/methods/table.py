"""The pruning methods by name, and the one way to call them."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from compressor.errors import UserError, nearest
from compressor.methods import admm, magnitude, sparsegpt, wanda
from compressor.methods.result import Method, Pruned, RowGrid, Solve
from compressor.methods.settings import (
    AdmmSettings,
    MagnitudeSettings,
    PruneSettings,
    SparseGPTSettings,
    WandaSettings,
)
from compressor.methods.statistics import (
    FactorizationError,
    InputStatistics,
    InverseFactor,
    NonFiniteHessianError,
    accumulate,
    all_finite,
)

METHODS: Final[dict[str, Method]] = {
    "magnitude": Method(MagnitudeSettings, magnitude.solve),
    "wanda": Method(WandaSettings, wanda.solve),
    "sparsegpt": Method(SparseGPTSettings, sparsegpt.solve),
    "admm": Method(AdmmSettings, admm.solve),
}

__all__ = [
    "METHODS",
    "FactorizationError",
    "InputStatistics",
    "InverseFactor",
    "Method",
    "NonFiniteHessianError",
    "PruneSettings",
    "Pruned",
    "RowGrid",
    "Solve",
    "accumulate",
    "solve",
]


def solve(
    method: str,
    weight: Tensor,
    stats: InputStatistics | None,
    settings: PruneSettings,
    sparsity: float | None = None,
    frozen: Tensor | None = None,
) -> Pruned:
    """Prune ``weight`` (m, n) by the method of that name, and hold it to the contract of docs/design.md 2.2.

    Args:
        weight: (m, n), any float dtype; worked on in fp32, not modified.
        stats: the statistics of its input, on the same device; None for a data-free method or too few tokens.
        settings: of the method's own class.
        sparsity: of this matrix, in (0, 1); that of the settings when None. Not used with an N:M pattern.
        frozen: (m, n) bool, positions pruned before: they stay zero, and count.

    Raises:
        UserError: unknown method; weight not finite; pattern that does not divide n.
        FactorizationError: the statistics are of no use; call again with ``stats=None`` to go on without data.
    """
    entry = _method(method)
    if weight.ndim != 2:
        raise ValueError(f"weight must be (outputs, inputs), not {tuple(weight.shape)}")
    if not isinstance(settings, entry.settings):
        raise TypeError(f"{method} takes {entry.settings.__name__}, not {type(settings).__name__}")
    if stats is not None and stats.hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a Hessian {tuple(stats.hessian.shape)} does not belong to a weight {tuple(weight.shape)}")
    weight = weight.detach().float()
    if not all_finite(weight):
        raise UserError("the weight holds NaN or infinite values", fix="leave the module out with --exclude")
    pruned = entry.solve(weight, stats, settings, sparsity, frozen)
    if not all_finite(pruned.weight):
        raise FactorizationError(f"{method} gave values that are not finite")
    wrong = ~pruned.mask if frozen is None else ~pruned.mask | frozen
    if bool((pruned.weight != 0).logical_and_(wrong).any()):
        raise RuntimeError(f"{method} left weights outside its mask; please report this")
    return pruned


def _method(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"no pruning method is called {name!r}{nearest(name, METHODS)}", fix="see --method")
    return METHODS[name]
