"""Signs, scales and salient weights that together give back what a linear does to its inputs.

Some rows w of a weight are written as q: free where salient, mean_g + scale_g or mean_g - scale_g elsewhere, g the
group of the input. Everything here makes (w - q) A (w - q)^T smaller, A the damped Hessian, by turns

- in all salient values, means and scales of a row at once, for fixed signs: a linear least-squares problem, solved by
  conjugate gradients (`refit_`);
- in one input after the other, each row taking the best of the values that it may have there (`descend_`): the other
  sign, another integer, or, at a price, another choice of what is salient.

Rows are independent, and stand as columns, so that one input of all of them is contiguous: (n, r) for n inputs, r rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.int_grid import IntGrid
from compressor.methods.sweep import Snap
from compressor.methods.threads import matmul, submul_

CHUNK = 1 << 21
"""Weights that are refitted at once, so that a dozen intermediates stay small beside the matrix."""


@dataclass
class Rows:
    """Some rows of a weight on their way to signs and integers; G groups of ``group`` inputs, the last may be shorter.

    Attributes:
        target: w, (n, r) fp32.
        value: q, the same.
        salient: (n, r) bool.
        plus: (n, r) bool, the signs; without meaning where salient.
        mean: (G, r) fp32.
        scale: (G, r) fp32, not negative.
        group: inputs a group.
        means: whether means are fitted; else they are 0.
    """

    target: Tensor
    value: Tensor
    salient: Tensor
    plus: Tensor
    mean: Tensor
    scale: Tensor
    group: int
    means: bool = True

    def binary(self) -> Tensor:
        """Return what the signs stand for, (n, r), also where salient."""
        scale = spread(self.scale, self.group, len(self.target))
        return torch.where(self.plus, scale, -scale).add_(spread(self.mean, self.group, len(self.target)))

    def assemble_(self) -> None:
        """Give every weight that is not salient the value of its sign."""
        self.value = torch.where(self.salient, self.value, self.binary())


def spread(x: Tensor, group: int, n: int) -> Tensor:
    """Return ``x`` (G, r) with each row repeated for the inputs of its group: (n, r)."""
    return x.repeat_interleave(group, dim=0)[:n]


def group_sums(x: Tensor, group: int) -> Tensor:
    """Return the sums (G, r) of ``x`` (n, r) over the inputs of each group."""
    n, r = x.shape
    if n % group:
        x = torch.cat([x, x.new_zeros(-n % group, r)])
    return x.view(-1, group, r).sum(1)


def on_weights(target: Tensor, salient: Tensor, group: int, *, means: bool = True) -> Rows:
    """Return the start that looks at the weights alone: the mean, and the mean distance from it, of what is binary.

    For these means the signs and scales are the best ones in the plain squared error. Salient weights keep their value.
    """
    n = len(target)
    binary = (~salient).to(target.dtype)
    count = group_sums(binary, group).clamp_(min=1)
    mean = group_sums(target * binary, group) / count if means else torch.zeros_like(count)
    centred = target - spread(mean, group, n)
    scale = group_sums(centred.abs() * binary, group) / count
    rows = Rows(target, target, salient, centred >= 0, mean, scale, group, means)
    rows.assemble_()
    return rows


def price_alone(rows: Rows) -> Tensor:
    """Return (n, r): the squared error of each weight if it is a sign, for the means and scales as they are."""
    n = len(rows.target)
    centred = rows.target - spread(rows.mean, rows.group, n)
    return centred.abs_().sub_(spread(rows.scale, rows.group, n)).square_()


class _Tied:
    """The space of all q that fixed signs allow: dimension 2 a group, 1 without means, and 1 a salient weight."""

    def __init__(self, rows: Rows) -> None:
        self.group = rows.group
        self.salient = rows.salient
        self.binary = (~rows.salient).to(rows.target.dtype)
        self.sign = torch.where(rows.plus, self.binary, -self.binary)
        self.count = group_sums(self.binary, self.group)
        self.excess = group_sums(self.sign, self.group)
        # Where all signs of a group agree, mean and scale say the same: the mean is left at zero.
        determinant = self.count.square() - self.excess.square()
        self.both = (determinant > 0.5) & rows.means
        self.reciprocal = torch.where(self.both, determinant, self.count.clamp(min=1)).reciprocal()

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale, (G, r), of the point nearest to ``x`` (n, r)."""
        along = group_sums(x * self.sign, self.group)
        total = group_sums(x * self.binary, self.group)
        scale = torch.where(self.both, self.count * along - self.excess * total, along)
        mean = torch.where(self.both, self.count * total - self.excess * along, 0)
        return mean * self.reciprocal, scale * self.reciprocal

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the space nearest to ``x`` (n, r)."""
        mean, scale = self.coefficients(x)
        near = spread(scale, self.group, len(x)).mul(self.sign).add_(spread(mean, self.group, len(x)))
        return torch.where(self.salient, x, near)


def refit_(rows: Rows, A: Tensor, iterations: int) -> None:
    """Improve salient values, means and scales together by ``iterations`` steps of conjugate gradients.

    Rows that did not gain keep what they had. ``A`` (n, n) symmetric positive definite. Some rows at a time.
    """
    n, r = rows.target.shape
    width = max(1, CHUNK // max(1, n))
    for start in range(0, r, width):
        part = slice(start, start + width)
        fields = (rows.target, rows.value, rows.salient, rows.plus, rows.mean, rows.scale)
        target, value, salient, plus, mean, scale = (x[:, part].contiguous() for x in fields)
        some = Rows(target, value, salient, plus, mean, scale, rows.group, rows.means)
        _refit_(some, A, iterations)
        rows.value[:, part], rows.plus[:, part] = some.value, some.plus
        rows.mean[:, part], rows.scale[:, part] = some.mean, some.scale


def _refit_(rows: Rows, A: Tensor, iterations: int) -> None:
    tied = _Tied(rows)
    n = len(rows.target)
    start = tied.project(rows.value)
    # One number for all of a group's binary weights, so that dividing by it does not leave the space.
    diagonal = A.diagonal()[:, None]
    average = group_sums(diagonal * tied.binary, rows.group) / tied.count.clamp(min=1)
    D = torch.where(rows.salient, diagonal, spread(average, rows.group, n)).clamp_(min=torch.finfo(A.dtype).tiny)
    Q = start.clone()
    full = matmul(A, rows.target - Q)
    before = _losses(rows.target - Q, full)
    R = tied.project(full)
    Z = R / D
    P = Z.clone()
    rz = (R * Z).sum(0)
    for _ in range(iterations):
        AP = tied.project(matmul(A, P))
        curvature = (P * AP).sum(0)
        alpha = torch.where(curvature > 0, rz / curvature, 0)
        Q.addcmul_(P, alpha)
        R.addcmul_(AP, alpha, value=-1)
        torch.div(R, D, out=Z)
        previous, rz = rz, (R * Z).sum(0)
        P = torch.addcmul(Z, P, torch.where(previous > 0, rz / previous, 0))
    D = rows.target - Q
    better = _losses(D, matmul(A, D)) <= before
    rows.value = torch.where(better, Q, start)
    mean, scale = tied.coefficients(rows.value)
    rows.plus = torch.where(spread(scale < 0, rows.group, n), ~rows.plus, rows.plus)
    rows.mean, rows.scale = mean, scale.abs()
    rows.assemble_()


def gradient(rows: Rows, A: Tensor) -> Tensor:
    """Return A (w - q), (n, r): half of what the loss falls by when q moves."""
    return matmul(A, rows.target - rows.value)


def losses(rows: Rows, A: Tensor) -> Tensor:
    """Return (w - q) A (w - q)^T for every row, (r,) fp64."""
    D = rows.target - rows.value
    return _losses(D, matmul(A, D))


def price(rows: Rows, A: Tensor, g: Tensor, grid: IntGrid | None = None) -> Tensor:
    """Return (n, r): how much more a row loses if this weight is a sign than if it is salient, the others as they are.

    ``g`` is `gradient`; salient weights may have any value, or one of those of their row's ``grid``.
    """
    n = len(rows.target)
    diagonal = A.diagonal()[:, None]
    wanted = (g / diagonal).add_(rows.value)
    distance = wanted.sub(spread(rows.mean, rows.group, n)).abs_()
    distance.sub_(spread(rows.scale, rows.group, n)).square_()
    if grid is not None:
        distance -= wanted.sub_(grid.snap(wanted)).square_()
    return distance.mul_(diagonal)


def descend_(
    rows: Rows,
    A: Tensor,
    g: Tensor,
    *,
    snap: Snap | None = None,
    above: float | None = None,
    block: int = 128,
) -> None:
    """Go through the inputs once; each row takes the value that is best for it there, means and scales as they are.

    No step makes a row's loss larger; with ``above``, loss plus ``above`` times the number of salient weights.

    Args:
        A: (n, n) symmetric, positive diagonal.
        g: `gradient`; brought up to date.
        snap: where salient weights may stand; anywhere when None.
        above: a weight becomes or stays salient where its `price` is above this; None leaves the choice as it is.
        block: inputs whose moves are passed on to the others together.
    """
    n, r = rows.target.shape
    value, salient, plus = rows.value.clone(), rows.salient.clone(), rows.plus.clone()
    diagonal = A.diagonal()
    moved = torch.empty(min(block, n), r, dtype=value.dtype, device=value.device)
    for a in range(0, n, block):
        b = min(a + block, n)
        for j in range(a, b):
            mean, scale = rows.mean[j // rows.group], rows.scale[j // rows.group]
            wanted = g[j] / diagonal[j] + value[j]
            positive = wanted >= mean
            near = torch.where(positive, mean + scale, mean - scale)
            free = wanted if snap is None else snap(j, wanted)
            if above is not None:
                salient[j] = ((wanted - near).square_() - (wanted - free).square_()) * diagonal[j] > above
            settled = torch.where(salient[j], free, near)
            step = torch.sub(settled, value[j], out=moved[j - a])
            value[j], plus[j] = settled, positive
            if j + 1 < b:
                g[j + 1 : b].addcmul_(A[j + 1 : b, j, None], step[None], value=-1)
        steps = moved[: b - a]
        for rest in (slice(0, a), slice(b, n)):
            submul_(g[rest], A[rest, a:b], steps)
        submul_(g[a:b], A[a:b, a:b].triu(), steps)  # what lies below the diagonal was passed on at once
    rows.value, rows.salient, rows.plus = value, salient, plus


def _losses(D: Tensor, AD: Tensor) -> Tensor:
    return (D * AD).sum(0, dtype=torch.float64)
