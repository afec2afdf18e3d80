"""What the methods know of a linear's input: H = sum of x x^T over the calibration tokens, and its inverse's factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from compressor.methods.cholesky import NotPositiveDefiniteError, upper_inverse_factor
from compressor.methods.threads import one_thread, steady


class FactorizationError(ArithmeticError):
    """The Hessian of an input cannot be factorized, whatever is tried. Only a data-free method can go on."""


class NonFiniteHessianError(FactorizationError):
    """The Hessian holds NaN or infinity: the activations were not finite, or overflowed."""


@dataclass(frozen=True)
class InverseFactor:
    """``(H' + damp * mean(diag) * I)^-1 = upper^T upper``, where H' is H with the mean on the diagonal of dead inputs.

    Attributes:
        upper: U (n, n) fp32, upper triangular, positive diagonal.
        dead: (n,) bool, inputs that were zero for every token.
        damp: the relative damping that finally worked.
        rungs: what had to be tried beyond the ordinary fp32 factorization, in order; empty when that worked.
    """

    upper: Tensor
    dead: Tensor
    damp: float
    rungs: tuple[str, ...]


@dataclass
class InputStatistics:
    """The second moment of one input, shared by all linears that read this input.

    Attributes:
        hessian: (n, n) fp32, the sum over tokens of x x^T; neither averaged nor damped (its scale changes no result).
        tokens: how many rows x were summed.
        drift: (n, n) fp32, sum over tokens of (x' - x) x^T, where x' is the input behind untouched blocks; None when
            that was not asked for.
        total: (n,) fp32, sum over tokens of x; None when that was not asked for.
        absolute: (n,) fp32, sum over tokens of |x|; likewise.
    """

    hessian: Tensor
    tokens: int
    drift: Tensor | None = None
    total: Tensor | None = None
    absolute: Tensor | None = None
    _factors: dict[tuple[float, bytes], InverseFactor] = field(default_factory=dict, repr=False, compare=False)

    def factor(self, damp: float, order: Tensor | None = None) -> InverseFactor:
        """Return the factor of the inverse of the damped H; computed once per ``damp`` and ``order``.

        Args:
            order: (n,) int64, a permutation: of H with its inputs in that order.

        Raises:
            FactorizationError: see `inverse_factor`.
        """
        key = damp, b"" if order is None else order.cpu().numpy().tobytes()
        if key not in self._factors:
            hessian = self.hessian if order is None else self.hessian[order][:, order]
            self._factors[key] = inverse_factor(hessian, damp)
        return self._factors[key]

    @property
    def rungs(self) -> tuple[str, ...]:
        """What the factorizations made so far had to try beyond the ordinary attempt."""
        return tuple(dict.fromkeys(rung for factor in self._factors.values() for rung in factor.rungs))

    def shift(self, damp: float) -> float:
        """Return what damping adds to every diagonal element: ``damp`` times the mean of diag H over live inputs."""
        return damp * _mean_live(self.hessian.diagonal())

    def norms(self) -> Tensor:
        """Return the root mean square of every input, (n,) fp32: Wanda's ||x_j|| up to a common factor."""
        return (self.hessian.diagonal().clamp(min=0) / max(self.tokens, 1)).sqrt()


def accumulate(hessian: Tensor, x: Tensor) -> None:
    """Add x^T x to ``hessian`` (n, n) fp32 in place; ``x`` (tokens, n) of any float dtype, multiplied in fp32.

    Only strips of the upper triangle are multiplied, and mirrored: little more than half of the work.
    """
    x = x.to(device=hessian.device, dtype=hessian.dtype)
    n = len(hessian)
    strip = max(128, -(-n // 8))
    for a in range(0, n, strip):
        b = min(a + strip, n)
        with steady(b - a, n - a):
            hessian[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])
        hessian[b:, a:b] = hessian[a:b, b:].T


def accumulate_drift(drift: Tensor, before: Tensor, x: Tensor) -> None:
    """Add (x' - x)^T x to ``drift`` (n, n) fp32 in place; ``before`` = x' and ``x`` (tokens, n) of any float dtype."""
    before, x = (rows.to(device=drift.device, dtype=drift.dtype) for rows in (before, x))
    with steady(*drift.shape):
        drift.addmm_((before - x).T, x)


def accumulate_moments(statistics: InputStatistics, x: Tensor) -> None:
    """Add the sums over tokens of x and of |x| to ``statistics``; ``x`` (tokens, n) of any float dtype."""
    x = x.to(device=statistics.hessian.device, dtype=statistics.hessian.dtype)
    with one_thread():  # how a sum is divided decides its bits
        total, absolute = x.sum(0), x.abs().sum(0)
    statistics.total = total if statistics.total is None else statistics.total + total
    statistics.absolute = absolute if statistics.absolute is None else statistics.absolute + absolute


def damped(hessian: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return H (n, n) in ``dtype`` with dead inputs' diagonal set to the live mean, plus ``damp`` times that mean."""
    A = hessian.to(dtype, copy=True)
    diagonal = A.diagonal()
    mean = _mean_live(hessian.diagonal())
    diagonal.masked_fill_(hessian.diagonal() == 0, mean)
    diagonal.add_(damp * mean)
    return A


def all_finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor infinity: from its extremes, several times faster than element by element."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def check_finite(hessian: Tensor) -> None:
    """Raise NonFiniteHessianError if ``hessian`` holds NaN or infinity."""
    if not all_finite(hessian):
        bad = int((~torch.isfinite(hessian)).sum())
        raise NonFiniteHessianError(
            f"the Hessian of this input has {bad} of {hessian.numel()} entries that are not finite: "
            "the activations overflowed or were NaN"
        )


def inverse_factor(hessian: Tensor, damp: float) -> InverseFactor:
    """Factorize the inverse of the damped ``hessian`` (n, n) fp32, climbing a ladder where the ordinary attempt fails.

    The rungs: fp32; fp64; twice the damping, again and again while it stays below 1; the spectrum clamped from below to
    the damping. Every rung used beyond the first is named in the result.

    Raises:
        NonFiniteHessianError: NaN or infinity in ``hessian``.
        FactorizationError: no rung held.
    """
    check_finite(hessian)
    dead = hessian.diagonal() == 0
    rungs: list[str] = []
    for name, finally_damp, attempt in _ladder(hessian, damp):
        if name:
            rungs.append(name)
        try:
            U = attempt().float()
        except (NotPositiveDefiniteError, LinAlgError):
            continue
        if all_finite(U) and bool((U.diagonal() > 0).all()):
            return InverseFactor(U, dead, finally_damp, tuple(rungs))
    raise FactorizationError(f"the Hessian of this input cannot be factorized (tried: fp32, {', '.join(rungs)})")


def _ladder(hessian: Tensor, damp: float) -> list[tuple[str, float, Callable[[], Tensor]]]:
    def plain(d: float, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: upper_inverse_factor(damped(hessian, d, dtype))

    rungs = [("", damp, plain(damp, torch.float32)), ("fp64", damp, plain(damp, torch.float64))]
    d = 2 * damp
    while d < 1:
        rungs.append((f"damp {d:g}", d, plain(d, torch.float64)))
        d *= 2
    rungs.append(("eigenvalue clamp", damp, lambda: _clamped(hessian, damp)))
    return rungs


def _clamped(hessian: Tensor, damp: float) -> Tensor:
    """The factor for the nearest matrix with eigenvalues no less than the damping; in one thread for the same bits."""
    A = damped(hessian, 0.0, torch.float64)
    with one_thread():
        values, vectors = torch.linalg.eigh((A + A.T) / 2)
        floor = max(damp * _mean_live(hessian.diagonal()), 1e-6 * float(values.abs().max()))
        return upper_inverse_factor((vectors * values.clamp(min=floor)) @ vectors.T)


def _mean_live(diagonal: Tensor) -> float:
    """Mean of the non-zero entries, summed in one thread; 1 when all are zero or the mean is not positive."""
    values = diagonal.detach().double().cpu().numpy()
    live = values[values != 0]
    mean = float(live.sum() / live.size) if live.size else 0.0
    return mean if mean > 0 else 1.0
