"""The column sweep of optimal brain surgeon, shared by SparseGPT, GPTQ and their kin.

Columns are settled from left to right; what settling column j costs, e_j = (w_j - q_j) / U_jj, is made up for by the
columns to its right: w_k -= e_j U_jk. With H^-1 = U^T U this is exact, and the loss is sum_j e_j^2 / 2 per row.

(Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, and "GPTQ", arXiv 2210.17323.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.threads import submul_

PANEL = 16

Decide = Callable[[int, Tensor], Tensor | None]
"""``decide(start, columns)``: called every ``span`` columns with the *updated* weights (c, m) of columns start to
start + c, one column per row, not to be modified. Returns which to keep, (c, m) bool, or None for all; may also set up
what ``snap`` needs for these columns, such as the scales of a group."""

Snap = Callable[[int, Tensor], Tensor]
"""``snap(j, w)``: the representable values (m,) nearest to the updated column j, ``w`` (m,), not to be modified."""


@dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Attributes:
        weight: Q (m, n), zero outside ``mask``.
        mask: (m, n) bool, True = kept.
        loss: (m,) fp64, row by row (w - q) H (w - q)^T / 2 under the damped H that ``upper`` stands for.
    """

    weight: Tensor
    mask: Tensor
    loss: Tensor


def sweep(
    weight: Tensor,
    upper: Tensor,
    *,
    decide: Decide | None = None,
    span: int | None = None,
    snap: Snap | None = None,
    block: int = 128,
) -> Swept:
    """Settle the columns of ``weight`` (m, n) fp32 one after another under H = (U^T U)^-1, ``upper`` = U (n, n).

    The updates are delayed on two levels: within a panel of about 16 columns they are rank-1, from a panel to the rest
    of its block and from a block of ``block`` columns to the rest of the matrix they are matrix products. W is kept
    transposed, so that a column is contiguous.

    Args:
        decide: chooses the mask; keeps everything when None.
        span: how many columns one decision covers (``block`` when None); a block is cut to fit it.
        snap: maps a column to representable values; the identity when None.
    """
    W = weight.T.clone(memory_format=torch.contiguous_format)
    keep, loss = settle_(W, upper, decide=decide, span=span, snap=snap, block=block)
    if keep is None:
        return Swept(W.T.contiguous(), torch.ones(weight.shape, dtype=torch.bool, device=W.device), loss)
    W.masked_fill_(~keep, 0)  # and not a product: that would leave negative zeros
    return Swept(W.T.contiguous(), keep.T.contiguous(), loss)


def settle_(
    W: Tensor,
    upper: Tensor,
    *,
    decide: Decide | None = None,
    span: int | None = None,
    snap: Snap | None = None,
    block: int = 128,
) -> tuple[Tensor | None, Tensor]:
    """Like `sweep`, for weights that are transposed already, ``W`` (n, m) fp32, contiguous and overwritten.

    What is dropped is left in ``W`` as it was when it was settled.

    Returns:
        What is kept, (n, m) bool, or None for everything; and the loss (m,) fp64.
    """
    n, m = W.shape
    span = min(span or block, n)
    block, panel = _widths(span, min(block, n), n)
    keep: Tensor | None = None
    drop: Tensor | None = None  # 1 / U_jj where w_j is pruned: e_j in one product
    E = torch.empty(block, m, dtype=W.dtype, device=W.device)
    loss = torch.zeros(m, dtype=torch.float64, device=W.device)
    reciprocal = upper.diagonal().reciprocal().unsqueeze(1)
    # Rows, as columns of the weights and errors, taken apart once: views cost as much as the arithmetic of a column.
    columns, errors, coefficients = W.unbind(0), E.unbind(0), upper[:, :, None].unbind(0)
    factors = upper.diagonal().reciprocal().tolist() if snap is not None else []

    for a in range(0, n, block):
        b = min(a + block, n)
        for p in range(a, b, panel):
            q = min(p + panel, b)
            for j in range(p, q):
                if decide is not None and j % span == 0:
                    end = min(j + span, n)
                    chosen = decide(j, W[j:end])
                    if chosen is not None:
                        if keep is None or drop is None:
                            keep, drop = torch.ones_like(W, dtype=torch.bool), torch.zeros_like(W)
                        keep[j:end] = chosen
                        torch.mul(~chosen, reciprocal[j:end], out=drop[j:end])
                w, e = columns[j], errors[j - a]
                if snap is not None:
                    settled = snap(j, w)
                    if keep is not None:
                        settled = settled.masked_fill(~keep[j], 0)
                    torch.sub(w, settled, out=e).mul_(factors[j])
                    w.copy_(settled)
                elif drop is not None:
                    torch.mul(w, drop[j], out=e)
                else:
                    e.zero_()
                if j + 1 < q:
                    # addr_ would be a touch faster, but its bits depend on where threads divide the columns
                    W[j + 1 : q].addcmul_(coefficients[j][j + 1 : q], e, value=-1)
            if q < b:
                submul_(W[q:b], upper[p:q, q:b].T, E[p - a : q - a])
        settled_errors = E[: b - a]
        loss += settled_errors.square().sum(0)
        if b < n:
            submul_(W[b:], upper[a:b, b:].T, settled_errors)
    return keep, loss / 2


def _widths(span: int, block: int, n: int) -> tuple[int, int]:
    """Widths of block and panel such that every decision falls where its columns have received all their updates."""
    if span >= n:
        return block, min(PANEL, block)
    if span >= block:
        block = block if span % block == 0 else math.gcd(span, block)
        return block, min(PANEL, block)
    return block - block % span, span * max(1, PANEL // span)
