"""The decomposing methods: one closed form (`subspace`), each with its own metric of the inputs.

svd: none. asvd: the diagonal of mean |x|^(2 alpha) (ASVD, arXiv 2312.05821: W diag(s) truncated, and scaled back).
svd-llm, dobi: H, the second moment (SVD-LLM, arXiv 2403.07378; Dobi-SVD, arXiv 2502.02723, section 3.3, with the exact
eigenvectors in place of its incremental PCA). corda: H^2 (CorDA, arXiv 2406.05223: the SVD of W H, times H^-1), given
as its root H: its smallest components count as well, and they would drown in the rounding of a square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UserError
from compressor.formats.dense import Dense
from compressor.formats.low_rank import LowRank
from compressor.formats.sum import Sum
from compressor.methods.decompose_settings import AsvdSettings, CordaSettings, DecomposeSettings, SvdLlmSettings
from compressor.methods.factors import even_factors, foresee_factors
from compressor.methods.gptq import drift_target
from compressor.methods.statistics import InputStatistics, all_finite
from compressor.methods.subspace import Components, components, weighing
from compressor.methods.threads import matmul, one_thread


@dataclass(frozen=True)
class Decomposed:
    """A decomposed weight.

    Attributes:
        code: the product.
        bias: (m,) fp32, what to add to the layer's bias so that its mean output stays; None without.
        notes: sentences about anything unusual.
    """

    code: LowRank
    bias: Tensor | None = None
    notes: tuple[str, ...] = ()


def input_metric(stats: InputStatistics | None, settings: DecomposeSettings) -> Tensor | None:
    """Return the metric (n, n) of the inputs in which the method is nearest to a weight; None: the plain one.

    Of corda: a root of it.
    """
    if stats is None or not settings.needs_data:
        return None
    if isinstance(settings, AsvdSettings):
        assert stats.absolute is not None  # gathered for every decomposition
        return torch.diag((stats.absolute / max(stats.tokens, 1)).pow(2 * settings.alpha))
    if isinstance(settings, CordaSettings):
        return stats.hessian.double() / max(stats.tokens, 1)
    return stats.hessian


def take_apart(
    weight: Tensor, stats: InputStatistics | None, settings: DecomposeSettings, cost: Tensor | None = None
) -> Components:
    """Return all components of ``weight`` (m, n) fp32 by the method of ``settings``; arguments as for `decompose`."""
    rooted = isinstance(settings, CordaSettings)
    return components(weight, input_metric(stats, settings), cost, damp=settings.damp, rooted=rooted)


def decompose(
    weight: Tensor,
    stats: InputStatistics | None,
    settings: DecomposeSettings,
    rank: int,
    cost: Tensor | None = None,
    *,
    has_bias: bool = False,
    behind: InputStatistics | None = None,
) -> Decomposed:
    """Replace ``weight`` (m, n) by a product of ``rank``; with a residual, `with_residual` makes it whole again.

    Args:
        weight: (m, n), any float dtype; worked on in fp32 and fp64, not modified.
        stats: of its input, with its drift and moments where the settings ask for them; None for the weights alone.
        settings: of the method's own class.
        rank: 1 to min(m, n).
        cost: what errors of the outputs cost, in the coordinates of `subspace.output_basis`; None: all the same.
        has_bias: whether the layer has a bias, so that the mean of the outputs need not be fitted.
        behind: statistics of the inputs to which the left factor is fitted once more; None: it is not.

    Raises:
        UserError: weight not finite.
        FactorizationError: the Hessian cannot be factorized.
    """
    W = weight.detach().float()
    if not all_finite(W):
        raise UserError("the weight holds NaN or infinite values", fix="leave the module out with --exclude")
    target, mean = W, None
    metric = input_metric(stats, settings)
    if stats is not None and isinstance(settings, SvdLlmSettings) and not settings.residual:
        if settings.drift and stats.drift is not None:
            order = torch.arange(W.shape[1], device=W.device)
            target = drift_target(W, settings.drift * stats.drift, stats.factor(settings.damp).upper, order)
        if settings.bias and has_bias and stats.total is not None and stats.tokens:
            mean = stats.total / stats.tokens
            metric = stats.hessian - torch.outer(stats.total, mean)
    corda = settings if isinstance(settings, CordaSettings) else None
    parts = components(W, metric, cost, target=target, damp=settings.damp, rooted=corda is not None)
    if corda is not None and corda.components == "smallest":
        parts = Components(parts.values[-rank:], parts.left[:, -rank:], parts.right[-rank:])
    if behind is not None:
        parts = _refitted(parts, rank, target, behind.hessian)
    code = even_factors(
        parts,
        rank,
        target,
        stats if settings.needs_data else None,
        bits=settings.factor_bits,
        damp=settings.damp,
        weigh=None if cost is None else weighing(cost, W, settings.damp),
    )
    dense = code.dense().to(W.device)
    shift = None if mean is None else matmul(target - dense, mean[:, None])[:, 0]
    return Decomposed(code, shift)


def _refitted(parts: Components, rank: int, target: Tensor, hessian: Tensor) -> Components:
    """The first ``rank`` components with the left factor that is best for inputs of second moment ``hessian`` (n, n).

    L = T H R^T (R H R^T)^-1, whatever errors of the outputs cost.
    """
    with one_thread():
        R, H = parts.right[:rank].double(), hessian.double()
        left = target.double() @ H @ R.T @ torch.linalg.pinv(R @ H @ R.T, hermitian=True)
    return Components(parts.values[:rank], left.float(), parts.right[:rank])


def with_residual(weight: Tensor, code: LowRank, dtype: torch.dtype) -> Sum:
    """Return ``code`` beside what it leaves out of ``weight`` (m, n), rounded to ``dtype``: the only loss there is."""
    return Sum(Dense((weight.float() - code.dense().to(weight.device)).to(dtype)), code)


def foresee_low_rank(
    settings: DecomposeSettings, shape: tuple[int, int], dtype: str, rank: int | None
) -> dict[str, Any]:
    """Return the spec under which a matrix (m, n) = ``shape`` of the dtype of that name is stored; None: whole."""
    common = {"shape": list(shape), "dtype": dtype}
    if rank is None:
        return {"format": "dense", **common}
    product = {"format": "low-rank", **common, **foresee_factors(shape, rank, settings.factor_bits)}
    if not settings.residual:
        return product
    return {"format": "sum", **common, "base": {"format": "dense", **common}, "correction": product}
