"""A low-rank term beside a code, fitted to the code's error on the inputs (``--correct RANK``).

By turns the code is made from what the term leaves over, and the term from what the code leaves over, and the pair that
loses least is kept: LQ-LoRA (Guo et al., arXiv 2311.12023, algorithm 1) in the metric of the inputs, as CALDERA (Saha
et al., arXiv 2405.18886) has it. Where the factors are integers themselves, the right one is fitted to the left one as
it is stored, and rounded by GPTQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from compressor.formats.leaf import Leaf
from compressor.formats.low_rank import LowRank
from compressor.formats.sum import Sum
from compressor.methods.factors import balanced, foresee_factors, rounded_factors
from compressor.methods.low_rank import whitened_low_rank
from compressor.methods.quadratic import row_losses
from compressor.methods.quantize_settings import QuantizeSettings
from compressor.methods.result import Quantized
from compressor.methods.statistics import FactorizationError, InputStatistics, damped

ROUNDS = 3
"""How often code and term are made from each other; each time costs the method once more. No other number was tried."""


def corrected(
    quantize: Callable[[Tensor], Quantized],
    weight: Tensor,
    stats: InputStatistics | None,
    settings: QuantizeSettings,
) -> Quantized:
    """Return ``weight`` (m, n) fp32 as the sum of a code and a matrix of rank ``settings.correct``.

    Args:
        quantize: makes the code of a matrix.
        stats: of the input; None for the plain squared error.

    Raises:
        FactorizationError: the Hessian cannot be factorized.
    """
    rank = min(settings.correct, *weight.shape)
    upper = None if stats is None else stats.factor(settings.damp).upper
    A = None if stats is None else damped(stats.hessian, settings.damp)
    best: Quantized | None = None
    least = math.inf
    rest = weight
    for _ in range(ROUNDS):
        quantized = quantize(rest)
        base = quantized.code
        assert isinstance(base, Leaf)  # every method's code is one
        term = fit_term(weight - base.dense().to(weight.device), upper, stats, rank, settings)
        total = Sum(base, term)
        loss = _loss(weight - total.dense().to(weight.device), A)
        if loss < least:
            best, least = Quantized(total, quantized.notes), loss
        rest = weight - term.dense().to(weight.device)
    if best is None:
        raise FactorizationError("the corrected weight is not finite")
    return best


def fit_term(
    error: Tensor, upper: Tensor | None, stats: InputStatistics | None, rank: int, settings: QuantizeSettings
) -> LowRank:
    """Return the low-rank matrix nearest to ``error`` (m, n) in the metric of the inputs, its factors as stored."""
    left, right = whitened_low_rank(error, upper, rank)
    if settings.correct_bits == 16:
        return balanced(left, right)
    return rounded_factors(left, error, stats, bits=settings.correct_bits, damp=settings.damp)


def foresee_correction(settings: QuantizeSettings, base: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of the sum in which a code with the spec ``base`` ends up; ``base`` itself without correction."""
    if not settings.correct:
        return base
    (m, n), common = base["shape"], {"shape": base["shape"], "dtype": base["dtype"]}
    rank = min(settings.correct, m, n)
    factors = foresee_factors((m, n), rank, settings.correct_bits, "row")
    return {"format": "sum", **common, "base": base, "correction": {"format": "low-rank", **common, **factors}}


def _loss(delta: Tensor, A: Tensor | None) -> float:
    rows = delta.square().sum(1) if A is None else row_losses(delta, A)
    return math.fsum(rows.double().tolist())
