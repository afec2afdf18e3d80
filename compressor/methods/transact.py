"""Narrowing inside a module: fewer neurons of an MLP, fewer dimensions of the values of attention (TransAct).

TransAct (Shen et al., arXiv 2407.05690) keeps what has the largest activations inside a module and leaves its outside
as it was. Here what is kept is chosen by what the module's output loses, and the output matrix is fitted again.

Both are one problem. The output matrix W (m, n) reads x, and may from now on read only B^T x, where B (n, k) has
orthonormal columns: some columns of the identity for the neurons of an MLP, a basis for every key-value head for
attention, whose value matrix then gives B^T V. The loss is tr(D H D^T), D = W - W' B^T, with H the sum of x x^T. The
least of it, with a ridge that draws W' to W B, is

    W' = W B + (W - W B B^T) H B (B^T H B + lambda I)^-1,

and because W B is where the ridge draws to, W' is never worse than it, for any lambda.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.narrowing import expand_columns
from compressor.methods.quadratic import layer_error, row_losses
from compressor.methods.statistics import inverse_factor
from compressor.methods.threads import matmul, one_thread

DAMP = 0.01
AT_ONCE = 128
"""Rounds in which all columns would be eliminated; within a round only the cheapest are looked at again."""


@dataclass(frozen=True)
class Elimination:
    """In which order the inputs of a matrix are best given up.

    Attributes:
        order: (r,) int64, inputs, the first one first.
        losses: (r + 1,) fp64; ``losses[i]`` is what giving up the first i costs under the damped H, all else refitted.
    """

    order: Tensor
    losses: Tensor

    def kept(self, inputs: int, keep: int) -> Tensor:
        """Return the ``keep`` of ``inputs`` inputs that are given up last, ascending, (keep,) int64."""
        stays = torch.ones(inputs, dtype=torch.bool, device=self.order.device)
        stays[self.order[: inputs - keep]] = False
        return stays.nonzero().flatten()


@dataclass(frozen=True)
class NarrowMlp:
    """An MLP with fewer neurons.

    Attributes:
        kept: (k,) int64, ascending: which neurons are left.
        down: (m, k) fp32, the new down projection.
        loss: tr(D H D^T), undamped.
        relative_loss: this divided by tr(W H W^T).
    """

    kept: Tensor
    down: Tensor
    loss: float
    relative_loss: float


def eliminate(weight: Tensor, hessian: Tensor, count: int, damp: float = DAMP) -> Elimination:
    """Give up ``count`` inputs of ``weight`` (m, n), each time the one that costs least with all others refitted.

    With P the inverse of the damped H of what is left and w the refitted columns, giving up j costs |w_j|^2 / P_jj
    (Hassibi and Stork's optimal brain surgeon, for a column at a time). The cheapest few are taken out one by one
    exactly, with the others brought up to date after each round: the order is that of the exact greedy search but for
    inputs that only become cheap within a round.

    Inputs that are always zero go first and cost nothing.

    Raises:
        ValueError: ``count`` is not below n.
        FactorizationError: see `inverse_factor`.
    """
    n = weight.shape[1]
    if not 0 <= count < n:
        raise ValueError(f"{count} of {n} inputs cannot be given up")
    factor = inverse_factor(hessian, damp)
    P = matmul(factor.upper.T, factor.upper)
    W = weight.float().masked_fill(factor.dead, 0)
    left = torch.arange(n, device=weight.device)
    step = max(1, -(-n // AT_ONCE))
    order: list[int] = []
    costs = [0.0]
    while len(order) < count:
        taken, spent = _cheapest(W, P, min(step, count - len(order)))
        order += left[taken].tolist()
        costs += spent
        stays = torch.ones(len(left), dtype=torch.bool, device=W.device)
        stays[taken] = False
        W, P, left = *_without(W, P, taken, stays), left[stays]
    return Elimination(
        torch.tensor(order, dtype=torch.int64, device=weight.device), torch.tensor(costs, dtype=torch.float64).cumsum(0)
    )


def _cheapest(W: Tensor, P: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Places of the ``count`` columns to give up next, and what each costs; exact among the cheapest 4 ``count``."""
    scores = W.square().sum(0) / P.diagonal()
    among = torch.sort(scores, stable=True).indices[: 4 * count]
    with one_thread():
        p, w = P[among][:, among].double(), W[:, among].double()
        alive = torch.ones(len(among), dtype=torch.bool, device=W.device)
        taken, costs = [], []
        for _ in range(count):
            now = (w.square().sum(0) / p.diagonal()).masked_fill(~alive, torch.inf)
            j = int(now.argmin())
            taken.append(j)
            costs.append(float(now[j]))
            alive[j] = False
            row = p[j] / p[j, j]
            w = w - torch.outer(w[:, j], row)
            p = p - torch.outer(p[:, j], row)
            p.diagonal()[~alive] = 1.0
    return among[taken], costs


def _without(W: Tensor, P: Tensor, taken: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """W refitted and the inverse downdated for the columns that stay."""
    with one_thread():
        rows = torch.linalg.solve(P[taken][:, taken].double(), P[taken][:, stays].double()).to(W)
    return W[:, stays] - matmul(W[:, taken], rows), P[stays][:, stays] - matmul(P[stays][:, taken], rows)


def narrow_mlp(
    down: Tensor, hessian: Tensor, kept: Tensor, damp: float = DAMP, *, compensate: bool = True
) -> NarrowMlp:
    """Fit the down projection again on the neurons that are kept.

    Args:
        down: (m, n) fp32.
        hessian: (n, n) fp32, of the input of ``down``.
        kept: (k,) int64, ascending.
        compensate: False for the plain columns of ``down``.
    """
    fitted = down[:, kept]
    if compensate:
        rest = down.index_fill(1, kept, 0)
        fitted = fit_again(fitted, matmul(rest, hessian[:, kept]), hessian[kept][:, kept], damp)
    return NarrowMlp(kept, fitted, *layer_error(down, expand_columns(fitted, kept, down.shape[1]), hessian))


def fit_again(plain: Tensor, missing: Tensor, inner: Tensor, damp: float) -> Tensor:
    """Return W B + (W - W B B^T) H B (B^T H B + lambda I)^-1, but W B for rows that rounding would make worse.

    Args:
        plain: W B (m, k) fp32.
        missing: (W - W B B^T) H B (m, k) fp32: what the part that is given up would add to the right-hand side.
        inner: B^T H B (k, k) fp32.
        damp: lambda, relative to the mean of the diagonal of ``inner``.

    Raises:
        FactorizationError: see `inverse_factor`.
    """
    U = inverse_factor(inner, damp).upper
    change = matmul(matmul(missing, U.T), U)
    gain = 2 * (change * missing).sum(1, dtype=torch.float64) - row_losses(change, inner).double()
    return plain + change.masked_fill(~(gain > 0)[:, None], 0)
