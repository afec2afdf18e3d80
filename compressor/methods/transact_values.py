"""Narrower values: a basis for the values of every key-value head, and an output projection fitted to it (TransAct).

Head h gives z_h, a mixture of the values of its key-value head g(h), and the output is sum_h O_h z_h. When values are
P_g^T V_g (d' dimensions for d), heads give P_g^T z_h. Any basis of the same subspace is as good; the loss is that of
`compressor.methods.transact` with B the block diagonal matrix of all P_g(h).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.narrowing import expand_output, project_columns
from compressor.methods.quadratic import layer_error
from compressor.methods.statistics import inverse_factor
from compressor.methods.threads import matmul, one_thread
from compressor.methods.transact import DAMP, fit_again

TURNS = 16
ENOUGH = 1e-3
"""Turns end when one lowers the loss by a smaller share."""


@dataclass(frozen=True)
class NarrowValues:
    """Attention with narrower values.

    Attributes:
        bases: P (key-value heads, d, d') fp32, orthonormal columns.
        output: O' (m, heads d') fp32, the new output projection.
        loss: tr(D H D^T), D = O - O' B^T, undamped.
        relative_loss: this divided by tr(O H O^T).
    """

    bases: Tensor
    output: Tensor
    loss: float
    relative_loss: float


def value_bases(output: Tensor, hessian: Tensor, kv_heads: int, dim: int, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """Return a basis of every key-value head's values, what matters most first, and what each direction is worth.

    For one head that has its values for itself, and without the other heads' help, the best O_h' P^T is the best matrix
    of low rank under H_hh, U U^T O_h with U the leading eigenvectors of O_h H_hh O_h^T, and so P spans O_h^T U. These
    are the leading generalized eigenvectors of H O^T O H against H. Where heads share values H differs by head and
    there is no closed form: the first matrix is summed over the heads, the second averaged; exact where the H_hh are
    equal.

    Args:
        output: O (m, heads d) fp32.
        hessian: H (heads d, heads d) fp32, of the input of O.
        kv_heads: how many heads have values of their own; consecutive heads share one.
        dim: d.

    Returns:
        (kv_heads, d, d) fp32, orthonormal columns, of which the first d' span the dimensions to keep; (kv_heads, d)
        fp64, falling: the loss of narrowing to d' is about the sum over [:, d':], without help from other heads.

    Raises:
        FactorizationError: see `inverse_factor`.
    """
    bases, worths = [], []
    for heads in torch.arange(output.shape[1], device=output.device).reshape(kv_heads, -1, dim):
        blocks = [(hessian[head][:, head], output[:, head]) for head in heads]
        metric = torch.stack([H for H, _ in blocks]).mean(0)
        U = inverse_factor(metric, damp).upper.double()
        with one_thread():
            inner = torch.stack([_square(X.double() @ H.double()) for H, X in blocks]).sum(0)
            values, vectors = torch.linalg.eigh(U @ inner @ U.T)
            bases.append(torch.linalg.qr(U.T @ vectors.flip(1)).Q.float())
            worths.append(values.flip(0).clamp(min=0))
    return torch.stack(bases), torch.stack(worths)


def _square(X: Tensor) -> Tensor:
    return X.T @ X


def narrow_values(
    output: Tensor, hessian: Tensor, bases: Tensor, damp: float = DAMP, *, compensate: bool = True
) -> NarrowValues:
    """Fit the output projection again, all heads together, to values that are given in ``bases``.

    Args:
        output: O (m, heads d) fp32.
        hessian: (heads d, heads d) fp32.
        bases: P (kv_heads, d, d') fp32, orthonormal columns.
        compensate: False for O_h P.

    Raises:
        FactorizationError: see `inverse_factor`.
    """
    fitted = project_columns(output, bases)
    if compensate:
        rest = output - expand_output(fitted, bases)
        missing = project_columns(matmul(rest, hessian), bases)
        fitted = fit_again(fitted, missing, _inside(hessian, bases), damp)
    return NarrowValues(bases, fitted, *layer_error(output, expand_output(fitted, bases), hessian))


def _inside(hessian: Tensor, bases: Tensor) -> Tensor:
    """B^T H B."""
    inner = project_columns(project_columns(hessian, bases).T.contiguous(), bases)
    return (inner + inner.T) / 2


def improve(output: Tensor, hessian: Tensor, start: Tensor, damp: float = DAMP, turns: int = TURNS) -> NarrowValues:
    """Take turns between the output projection and all subspaces together, each fitted with the other held.

    For a given O' the loss is quadratic in the E_g of O' E (E_g = P_g^T at first). One preconditioned step lowers it
    (more steps a turn were no better), and only its span is taken over. So heads that share values, and heads that
    know of each other, are seen as they are. No turn makes the loss larger: one that does is the last and not taken.

    Args:
        output: O (m, heads d) fp32.
        hessian: (heads d, heads d) fp32.
        start: P (kv_heads, d, d') fp32, orthonormal columns, as of `value_bases`.

    Raises:
        FactorizationError: see `inverse_factor`.
    """
    best = narrow_values(output, hessian, start, damp)
    if start.shape[1] == start.shape[2]:
        return best
    shift = damp * float(hessian.diagonal().double().mean())
    for _ in range(turns):
        E = _step(output, hessian, best, shift)
        with one_thread():
            bases = torch.linalg.qr(E.double().transpose(1, 2)).Q.float()
        now = narrow_values(output, hessian, bases, damp)
        if not now.loss < best.loss:
            break
        best, before = now, best.loss
        if now.loss > (1 - ENOUGH) * before:
            break
    return best


def _step(output: Tensor, hessian: Tensor, now: NarrowValues, shift: float) -> Tensor:
    """E (kv_heads, d', d) with a lower loss than P^T for the given O': the best length of one preconditioned step."""
    groups, dim, width = now.bases.shape

    def pulled(D: Tensor) -> Tensor:
        """-1/2 of the gradient over E of tr(D H D^T), for D = O - O' E (m, heads d)."""
        blocks = zip(
            torch.split(now.output, width, 1),
            torch.split(matmul(D, hessian).add_(D, alpha=shift), dim, 1),
            strict=True,
        )
        return torch.stack([matmul(X.T, Y) for X, Y in blocks]).reshape(groups, -1, width, dim).sum(1)

    E = now.bases.transpose(1, 2)
    left, right = _preconditioner(hessian, now, shift)
    down = pulled(output - expand_output(now.output, now.bases))
    way = left @ down @ right
    curvature = (way * pulled(expand_output(now.output, way.transpose(1, 2)))).sum(dtype=torch.float64)
    slope = (way * down).sum(dtype=torch.float64)
    return E + float(slope / curvature) * way if bool((curvature > 0) & (slope > 0)) else E


def _preconditioner(hessian: Tensor, now: NarrowValues, shift: float) -> tuple[Tensor, Tensor]:
    """(sum_h O'_h^T O'_h)^-1 and (mean H_hh)^-1 of every key-value head: exact for a head that has its values alone."""
    groups, dim, width = now.bases.shape
    outputs = now.output.T.reshape(groups, -1, width, len(now.output)).transpose(0, 1)
    spans = torch.arange(len(hessian), device=hessian.device).reshape(groups, -1, dim).transpose(0, 1)
    left = torch.stack([_square(X.T) for shared in outputs for X in shared])
    right = torch.stack([hessian[span][:, span] for shared in spans for span in shared])
    summed = (block.reshape(-1, groups, *block.shape[1:]).double().sum(0) for block in (left, right))
    gram, metric = summed
    metric = metric / len(spans) + shift * torch.eye(dim).to(metric)
    floor = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    gram = gram + floor[:, None, None] * torch.eye(width).to(gram)
    with one_thread():
        return torch.linalg.inv(gram).float(), torch.linalg.inv(metric).float()
