"""PTQ1.61 (arXiv 2502.13179): a fifth of the inputs in 4 bits, of all other weights a sign, scaled by row and by input.

``fit="paper"`` is the published start: the inputs with the strongest activations stay (by root mean square; the paper
takes the largest one), each row has the mean of its other weights and their mean size, inputs have no scale yet. What
the paper does next, learning all scales block by block, is ``--tune-steps``.

The default looks for more before it learns. Inputs stay by what their signs would cost at the output. The columns are
settled with error feedback, the inputs that stay last, so that they make up for all others. Then by turns, under the
damped Hessian A: means and scales of the rows, scales of the inputs (each a least-squares problem with a closed
solution), signs by coordinate descent, and the inputs that stay once more. No turn makes the loss larger, but for the
rounding to fp16 at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.formats.scaled_binary import ScaledBinary
from compressor.methods.cholesky import upper_inverse_factor
from compressor.methods.int_grid import IntGrid, best_grids, candidate_grids
from compressor.methods.quantize_settings import Ptq161Settings
from compressor.methods.result import Quantized
from compressor.methods.statistics import InputStatistics, damped
from compressor.methods.sweep import sweep
from compressor.methods.threads import matmul, one_thread, submul_

BLOCK = 128


@dataclass(frozen=True)
class Fit:
    """A weight on its way, inputs first: the n - k binary ones, then the k that stay.

    Attributes:
        plus: (n - k, m) bool.
        mean, scale: (m,) fp32.
        column: (n - k,) fp32.
        kept: (k, m) fp32, values of the grid.
        grid: of the kept inputs, (m,).
    """

    plus: Tensor
    mean: Tensor
    scale: Tensor
    column: Tensor
    kept: Tensor
    grid: IntGrid

    def rows(self) -> Tensor:
        """Means plus or minus scales, (n - k, m): the values before the scales of the inputs."""
        return torch.where(self.plus, self.scale, -self.scale).add_(self.mean)

    def value(self) -> Tensor:
        """All weights, (n, m)."""
        return torch.cat([self.rows() * self.column[:, None], self.kept])


def foresee(settings: Ptq161Settings, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Return the spec under which a weight of ``shape`` (m, n) will be stored."""
    inputs = kept_inputs(settings, shape[1])
    return {"format": "scaled-binary", "shape": list(shape), "dtype": dtype, "inputs": inputs, "bits": settings.bits}


def kept_inputs(settings: Ptq161Settings, n: int) -> int:
    """How many of ``n`` inputs stay."""
    return min(n, round(settings.salient * n))


def solve(
    weight: Tensor, stats: InputStatistics | None, settings: Ptq161Settings, frozen: Tensor | None = None
) -> Quantized:
    """Write ``weight`` (m, n) fp32 as signs and a few inputs of integers; without ``stats`` by its values alone.

    A sign cannot say zero: ``frozen`` weights are binarized like any other.

    Raises:
        FactorizationError: the Hessian cannot be factorized.
    """
    n = weight.shape[1]
    k = kept_inputs(settings, n)
    paper = settings.fit == "paper" or stats is None
    factor = None if paper or stats is None else stats.factor(settings.damp)
    A = None if factor is None or stats is None else damped(stats.hessian, factor.damp)
    strength = strengths(weight, stats, A, paper=settings.fit == "paper")
    order = strength.argsort(stable=True)
    order = torch.cat([order[: n - k].sort().values, order[n - k :].sort().values])
    T = weight.T[order].contiguous()
    if A is None:
        fit = _start(T, k, settings.bits)
    else:
        A = A[order][:, order]
        fit = improved(T, A, swept(T, A, _start(T, k, settings.bits), settings), settings)
    notes = () if factor is None or not factor.rungs else (f"the Hessian needed: {', '.join(factor.rungs)}",)
    return Quantized(_stored(fit, order, settings.bits), notes)


def salient_inputs(weight: Tensor, stats: InputStatistics | None, settings: Ptq161Settings) -> Tensor:
    """Return which inputs (n,) bool of ``weight`` (m, n) would stay."""
    A = None if stats is None else damped(stats.hessian, settings.damp)
    order = strengths(weight, stats, A, paper=settings.fit == "paper").argsort(stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool, device=weight.device)
    chosen[order[len(order) - kept_inputs(settings, len(order)) :]] = True
    return chosen


def strengths(weight: Tensor, stats: InputStatistics | None, A: Tensor | None, *, paper: bool) -> Tensor:
    """Return how much each input (n,) deserves to stay."""
    if stats is not None and paper:
        return stats.norms()
    centred = (weight - weight.mean(1, keepdim=True)).abs()
    cost = (centred - centred.mean(1, keepdim=True)).square().sum(0)
    return cost if A is None else cost * A.diagonal()


def _start(T: Tensor, k: int, bits: int) -> Fit:
    """Means, and mean sizes of the weights (n, m) themselves, with the last ``k`` inputs rounded."""
    binary, kept = T[: len(T) - k], T[len(T) - k :]
    mean = binary.mean(0) if len(binary) else T.new_zeros(T.shape[1])
    scale = (binary - mean).abs().mean(0) if len(binary) else torch.zeros_like(mean)
    grid = _grid(kept, bits)
    return Fit(binary >= mean, mean, scale, torch.ones_like(binary[:, 0]), grid.snap(kept), grid)


def _grid(kept: Tensor, bits: int) -> IntGrid:
    """The asymmetric grid of least squared error of every row, for its kept weights (k, m)."""
    columns = kept if len(kept) else kept.new_zeros(1, kept.shape[1])
    return best_grids(columns, candidate_grids(columns, bits, asymmetric=True, clip=True), 1)[0]


def swept(T: Tensor, A: Tensor, fit: Fit, settings: Ptq161Settings) -> Fit:
    """Settle the inputs of ``T`` (n, m) one after another with error feedback under ``A``, those that stay last."""
    upper = upper_inverse_factor(A)
    binary = len(fit.plus)
    plus = torch.empty_like(fit.plus)

    def snap(j: int, w: Tensor) -> Tensor:
        if j >= binary:
            return w
        plus[j] = w >= fit.mean
        return torch.where(plus[j], fit.scale, -fit.scale).add_(fit.mean)

    value = sweep(T.T, upper, snap=snap, block=settings.block).weight.T
    return _with_kept(replace(fit, plus=plus), value[binary:], upper[binary:, binary:], settings)


def _with_kept(fit: Fit, target: Tensor, upper: Tensor, settings: Ptq161Settings) -> Fit:
    """Round the inputs that stay, which should be ``target`` (k, m), with feedback among them."""
    if not len(target):
        return fit
    grid = _grid(target, settings.bits)
    kept = sweep(target.T, upper, snap=lambda _, w: grid.snap(w), block=settings.block).weight.T.contiguous()
    return replace(fit, kept=kept, grid=grid)


def improved(T: Tensor, A: Tensor, fit: Fit, settings: Ptq161Settings) -> Fit:
    """Take turns, ``settings.rounds`` times; none makes (t - q)^T A (t - q), summed over the rows, larger."""
    for _ in range(settings.rounds if len(fit.plus) else 0):
        fit = fit_rows(T, A, fit)
        fit = fit_columns(T, A, fit)
        fit = move_signs(T, A, fit)
        fit = fit_kept(T, A, fit, settings)
    return fit_rows(T, A, fit) if len(fit.plus) else fit


def fit_rows(T: Tensor, A: Tensor, fit: Fit) -> Fit:
    """The best means and scales of all rows at once; rows in which they are not determined keep theirs."""
    binary = len(fit.plus)
    signs = torch.where(fit.plus, fit.column[:, None], -fit.column[:, None])
    ones = fit.column[:, None].expand_as(signs)
    rest = T.clone()
    rest[binary:] -= fit.kept
    wanted = matmul(A[:binary], rest)
    A_signs, A_ones = matmul(A[:binary, :binary], signs), matmul(A[:binary, :binary], fit.column[:, None])
    ss, so, oo = (signs * A_signs).sum(0), (signs * A_ones).sum(0), (ones * A_ones).sum(0)
    s, o = (signs * wanted).sum(0), (ones * wanted).sum(0)
    determinant = ss * oo - so * so
    sound = determinant > 1e-6 * ss * oo
    scale = torch.where(sound, (oo * s - so * o) / determinant, fit.scale)
    mean = torch.where(sound, (ss * o - so * s) / determinant, fit.mean)
    plus = torch.where(scale < 0, ~fit.plus, fit.plus)
    return replace(fit, mean=mean, scale=scale.abs(), plus=plus)


def fit_columns(T: Tensor, A: Tensor, fit: Fit) -> Fit:
    """The best scales of all inputs at once: with M the values before them, (A o M M^T) c = rowsum(M o A t)."""
    binary = len(fit.plus)
    M = fit.rows()
    rest = T.clone()
    rest[binary:] -= fit.kept
    right = (M * matmul(A[:binary], rest)).sum(1)
    system = A[:binary, :binary] * matmul(M, M.T)
    with one_thread():
        lifted = system.double() + 1e-6 * system.diagonal().double().mean() * torch.eye(binary).to(system).double()
        solved, info = torch.linalg.solve_ex(lifted, right.double()[:, None])
    if int(info) or not bool(torch.isfinite(solved).all()):
        return fit
    return _no_worse(T, A, fit, replace(fit, column=solved[:, 0].float()))


def move_signs(T: Tensor, A: Tensor, fit: Fit) -> Fit:
    """Go through the binary inputs once; each row takes the better of the two values, the others as they are."""
    value = fit.value()
    G = matmul(A, T - value)
    plus = fit.plus.clone()
    high, low = fit.mean + fit.scale, fit.mean - fit.scale
    diagonal = A.diagonal()
    for start in range(0, len(plus), BLOCK):
        end = min(start + BLOCK, len(plus))
        moved = torch.empty(end - start, T.shape[1], dtype=T.dtype, device=T.device)
        for j in range(start, end):
            wanted = value[j] + G[j] / diagonal[j]
            one, other = high * fit.column[j], low * fit.column[j]
            plus[j] = (wanted - one).abs() <= (wanted - other).abs()
            step = torch.sub(torch.where(plus[j], one, other), value[j], out=moved[j - start])
            if j + 1 < end:
                G[j + 1 : end].addcmul_(A[j, j + 1 : end, None], step[None], value=-1)
        if end < len(G):
            submul_(G[end:], A[end:, start:end], moved)
    return replace(fit, plus=plus)


def fit_kept(T: Tensor, A: Tensor, fit: Fit, settings: Ptq161Settings) -> Fit:
    """What the inputs that stay should be now that all others are settled, rounded with feedback; if it is better."""
    binary = len(fit.plus)
    if binary == len(T):
        return fit
    error = T[:binary] - fit.rows() * fit.column[:, None]
    upper = upper_inverse_factor(A[binary:, binary:])
    shift = matmul(upper.T, matmul(upper, matmul(A[binary:, :binary], error)))
    return _no_worse(T, A, fit, _with_kept(fit, T[binary:] + shift, upper, settings), by_row=True)


def losses(T: Tensor, A: Tensor, fit: Fit) -> Tensor:
    """Return (t - q)^T A (t - q) for every row, (m,) fp64."""
    D = T - fit.value()
    return (D * matmul(A, D)).sum(0, dtype=torch.float64)


def _no_worse(T: Tensor, A: Tensor, old: Fit, new: Fit, *, by_row: bool = False) -> Fit:
    """The new fit where it loses less: row by row in what concerns the inputs that stay, or as a whole."""
    before, after = losses(T, A, old), losses(T, A, new)
    if not by_row:
        return new if float(after.sum()) < float(before.sum()) else old
    better = after < before
    assert old.grid.zero is not None and new.grid.zero is not None  # asymmetric
    grid = replace(
        old.grid,
        scale=torch.where(better, new.grid.scale, old.grid.scale),
        zero=torch.where(better, new.grid.zero, old.grid.zero),
    )
    return replace(old, kept=torch.where(better, new.kept, old.kept), grid=grid)


def _stored(fit: Fit, order: Tensor, bits: int) -> ScaledBinary:
    """The code whose inputs stand in their own order."""
    binary = len(fit.plus)
    salient = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    salient[order[binary:]] = True
    assert fit.grid.zero is not None
    low = 2 ** (bits - 1)
    codes = (fit.grid.offsets(fit.kept) + fit.grid.zero + low) if len(fit.kept) else fit.kept
    # Powers of two move from the inputs' scales to the rows', so that fp16 holds both.
    size = float(fit.column.abs().mean()) if binary else 1.0
    unit = 2.0 ** round(torch.tensor(size).log2().item()) if size > 0 else 1.0
    return ScaledBinary(
        fit.plus.T.contiguous(),
        _half(fit.scale * unit),
        _half(fit.mean * unit),
        _half(fit.column / unit),
        salient,
        codes.T.to(torch.uint8).contiguous(),
        _half(fit.grid.scale),
        (fit.grid.zero + low).to(torch.uint8),
        bits,
    )


def _half(x: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half()
