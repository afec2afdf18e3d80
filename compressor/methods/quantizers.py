"""The quantizing methods by name, and the one way to call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from compressor.errors import UserError
from compressor.formats.low_rank import LowRank
from compressor.formats.parts import Spec, matrix_shape
from compressor.methods import awq, gptq, pb_llm, ptq161, round_nearest, trit_planes
from compressor.methods.correction import corrected, foresee_correction
from compressor.methods.factors import best_right, leaf
from compressor.methods.quantize_settings import QuantizeSettings
from compressor.methods.result import Quantize, Quantized
from compressor.methods.statistics import FactorizationError, InputStatistics, all_finite
from compressor.methods.threads import matmul

SIDES = ("left", "right")


@dataclass(frozen=True)
class Quantizer:
    """One entry of `QUANTIZERS`.

    Attributes:
        solve: the method.
        foresee: (settings, (m, n), dtype name) -> the spec that it will store, as far as shapes tell.
    """

    solve: Quantize
    foresee: Callable[[Any, tuple[int, int], str], dict[str, Any]]


QUANTIZERS: Final[dict[str, Quantizer]] = {
    "awq": Quantizer(awq.solve, awq.foresee),
    "flexround": Quantizer(round_nearest.solve, round_nearest.foresee),  # the learning comes after, block by block
    "gptq": Quantizer(gptq.solve, gptq.foresee),
    "pb-llm": Quantizer(pb_llm.solve, pb_llm.foresee),
    "ptq161": Quantizer(ptq161.solve, ptq161.foresee),
    "rtn": Quantizer(round_nearest.solve, round_nearest.foresee),
    "trit-planes": Quantizer(trit_planes.solve, trit_planes.foresee),
}


def quantize(
    method: str,
    weight: Tensor,
    stats: InputStatistics | None,
    settings: QuantizeSettings,
    frozen: Tensor | None = None,
) -> Quantized:
    """Quantize ``weight`` (m, n) by the method of that name, and hold it to the contract of docs/design.md.

    Args:
        method: one of ``QUANTIZE_METHODS``.
        weight: (m, n), any float dtype; worked on in fp32, not modified.
        stats: the statistics of its input, on the same device; None for a data-free method or too few tokens.
        settings: of the method's own class.
        frozen: (m, n) bool, positions pruned before: they stay zero where the format can say zero.

    Returns:
        ``code``, the matrix as it would be stored, and ``notes``, sentences about anything unusual.

    Raises:
        UserError: weight not finite.
        FactorizationError: the statistics are of no use; call again with ``stats=None`` to go on without data.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (outputs, inputs), not {tuple(weight.shape)}")
    if stats is not None and stats.hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a Hessian {tuple(stats.hessian.shape)} does not belong to a weight {tuple(weight.shape)}")
    weight = weight.detach().float()
    if not all_finite(weight):
        raise UserError("the weight holds NaN or infinite values", fix="leave the module out with --exclude")
    solve = QUANTIZERS[method].solve
    if settings.correct:
        quantized = corrected(lambda rest: solve(rest, stats, settings, frozen), weight, stats, settings)
    else:
        quantized = solve(weight, stats, settings, frozen)
    if not all_finite(quantized.code.dense()):
        raise FactorizationError(f"{method} gave values that are not finite")
    return quantized


def quantize_factors(method: str, code: LowRank, stats: InputStatistics | None, settings: QuantizeSettings) -> LowRank:
    """Quantize the factors of ``code`` (m, n): the left one on what the right one makes of the inputs, then the other.

    The right factor is fitted to what came of the left one before it is quantized.

    Args:
        method: any; learning, corrections and scales folded into neighbours do not go with factors.
        stats: of the matrix's input; None for a data-free method.

    Raises:
        FactorizationError: the statistics are of no use; call again with ``stats=None``.
    """
    left, right = code.left.dense(torch.float32), code.right.dense(torch.float32)
    inner = None
    if stats is not None:
        left, right = left.to(stats.hessian.device), right.to(stats.hessian.device)
        inner = InputStatistics(matmul(matmul(right, stats.hessian), right.T), stats.tokens)
    first = leaf(quantize(method, left, inner, settings).code)
    fitted = best_right(first.dense().to(left.device), matmul(left, right))
    return LowRank(first, leaf(quantize(method, fitted, stats, settings).code))


def foresee_factors_of(method: str, settings: QuantizeSettings, spec: Spec) -> dict[str, Any]:
    """Return the spec of a low-rank matrix with ``spec`` once its factors are quantized."""
    sides = {side: foresee(method, settings, matrix_shape(spec[side]), spec[side]["dtype"]) for side in SIDES}
    return {**spec, **sides}


def foresee(method: str, settings: QuantizeSettings, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Return the spec under which a weight (m, n) = ``shape`` of the dtype of that name will be stored."""
    return foresee_correction(settings, QUANTIZERS[method].foresee(settings, shape, dtype))
