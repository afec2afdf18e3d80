"""Coordinate descent on the codes and scales of group integers, under the layer-wise quadratic loss.

For every row, min over codes and scales of (w - q) A (w - q)^T, A the damped Hessian. With R = (W - Q) A, the best
value for one weight, all others fixed, is q_j + R_j / A_jj, rounded to the grid; the best scale of a group with offsets
c = code - zero, all others fixed, is s + R c^T / (c A c^T). No step makes the loss larger. Columns are visited in their
order, a block at a time: within a panel of it every change is accounted for at once, in the rest of the block once for
the whole panel, and outside of it once for the whole block.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.formats.group_int import GroupInt, portable_scale
from compressor.methods.int_grid import IntGrid
from compressor.methods.threads import matmul, submul_

BLOCK = 128
PANEL = 16


def descend(
    weight: Tensor, code: GroupInt, hessian: Tensor, shift: float, rounds: int, frozen: Tensor | None = None
) -> GroupInt:
    """Return ``code`` with other codes and scales that are nearer to ``weight`` (m, n) fp32, row by row.

    Args:
        hessian: (n, n) fp32; A = hessian + shift I, ``shift`` > 0.
        rounds: passes over all columns at most; it ends when one changes nothing.
        frozen: (m, n) bool, keep their codes.
    """
    n = weight.shape[1]
    width = n // code.scale.shape[1]
    zero = torch.zeros_like(code.scale) if code.zero is None else code.zero.float()
    offsets = code.codes.T.float() - zero.T.repeat_interleave(width, 0)  # (n, m): a column is contiguous
    scale, fixed = code.scale.T.clone(), None if frozen is None else frozen.T
    A = hessian.clone()
    A.diagonal().add_(shift)
    R = matmul(A, weight.T - offsets * scale.repeat_interleave(width, 0))
    for _ in range(rounds):
        changed = False
        for g, start in enumerate(range(0, n, width)):
            group = slice(start, start + width)
            c, near, own = offsets[group], R[group], A[group, group]
            grid = IntGrid(scale[g], None if code.zero is None else zero[:, g], code.bits)
            before = c * scale[g]
            for a in range(0, width, BLOCK):
                _codes(slice(a, min(a + BLOCK, width)), c, grid, near, own, None if fixed is None else fixed[group])
            scale[g] = _scale(c, scale[g], near, own, code.bits)
            change = c * scale[g] - before
            for rest in (slice(0, group.start), slice(group.stop, n)):
                submul_(R[rest], A[rest, group], change)
            changed |= bool(change.any())
        if not changed:
            break
    codes = (offsets + zero.T.repeat_interleave(width, 0)).T.to(torch.int8).contiguous()
    return replace(code, codes=codes, scale=scale.T.contiguous())


def _codes(block: slice, offsets: Tensor, grid: IntGrid, R: Tensor, A: Tensor, fixed: Tensor | None) -> None:
    """Improve the ``offsets`` (w, m) of the columns of ``block``, one after another, and keep R (w, m) up to date.

    In units of the scales: what is best for offset j is c_j + T_j, T = R / (A_jj s), and a change d_j of it changes T_k
    by -A_kj / A_kk d_j.
    """
    own, now = A[block, block], offsets[block]
    diagonal = own.diagonal()[:, None]
    T, weights = R[block] / diagonal / grid.scale, own / diagonal
    better, changes = torch.empty_like(now), torch.empty_like(now)
    olds, targets, news, steps = (rows[:, None].unbind(0) for rows in (now, T, better, changes))  # (1, m) each
    columns = weights.T[:, :, None].unbind(0)  # (w, 1) each
    held = None if fixed is None else fixed[block][:, None].unbind(0)
    for p in range(0, len(now), PANEL):
        q = min(p + PANEL, len(now))
        for j in range(p, q):
            new = grid.round_(torch.add(olds[j], targets[j], out=news[j]))
            if held is not None:
                torch.where(held[j], olds[j], new, out=new)
            torch.sub(new, olds[j], out=steps[j])
            if j + 1 < q:
                T[j + 1 : q].addcmul_(columns[j][j + 1 : q], steps[j], value=-1)
        if q < len(now):
            submul_(T[q:], weights[q:, p:q], changes[p:q])
    now.copy_(better)
    submul_(R, A[:, block], changes.mul_(grid.scale))


def _scale(offsets: Tensor, scale: Tensor, R: Tensor, A: Tensor, bits: int) -> Tensor:
    """Return the best scale (m,) for the ``offsets`` (w, m) of a group, where it is better, and keep R up to date."""
    Y = matmul(A, offsets)
    curvature, gain = (offsets * Y).sum(0), (offsets * R).sum(0)
    rounded = portable_scale(scale + torch.where(curvature > 0, gain / curvature, 0.0), bits)
    step = rounded - scale
    better = step * (2 * gain - step * curvature) > 0
    R.addcmul_(Y, torch.where(better, step, 0.0)[None], value=-1)
    return torch.where(better, rounded, scale)
