"""Quantized weights as functions of parameters that can be learned: rounding by straight-through estimates.

A learner starts exactly at the code it is given, and `finish` gives a code of the same kind and size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt, portable_scale
from compressor.formats.low_rank import FACTOR_DTYPE, LowRank
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.scaled_binary import ScaledBinary
from compressor.formats.sum import Sum
from compressor.formats.trit_planes import TritPlanes, trit_combinations

INSIDE = 0.45  # of a step: how far from a code's own value its latent weight may start
FACTOR_PACE = 1.0
SCALE_PACE = 0.1  # scales act on whole groups, and learn more slowly

SMALLEST_REACH = 1e-6
"""How far at least from its mean a latent weight starts whose group has no scale."""


def through(value: Tensor, latent: Tensor) -> Tensor:
    """Return ``value``, with the gradient going to ``latent`` (the straight-through estimate)."""
    return latent + (value - latent).detach()


class FlexRoundLearner:
    """Integers in groups: W = s clip(round(R / exp(U))) with s and U learned (FlexRound, arXiv 2306.00317, eq. 2).

    R is W / s, moved to within the step that its code rounds, so that learning starts at the code; the division makes
    large weights move further than small ones, and leaves zeros where they are.
    """

    def __init__(self, code: GroupInt, weight: Tensor) -> None:
        """Start at ``code``, made from ``weight`` (m, n) fp32."""
        self.code = code
        m = len(code.codes)
        self.groups = code.scale.shape[1]
        zero = 0 if code.zero is None else code.zero[:, :, None].float()
        codes = code.codes.float().view(m, self.groups, -1) - zero
        exact = weight.view_as(codes) / code.scale[:, :, None]
        self.start = codes + (exact - codes).clamp(-INSIDE, INSIDE)
        self.low = -(2.0 ** (code.bits - 1)) - zero
        self.high = 2.0 ** (code.bits - 1) - 1 - zero
        self.divisor = torch.zeros_like(self.start)
        self.gain = torch.zeros_like(code.scale)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """U (m, G, n / G) and the logarithm of the change of s (m, G)."""
        return [(self.divisor, 1.0), (self.gain, SCALE_PACE)]

    def _integers(self) -> Tensor:
        latent = self.start * torch.exp(-self.divisor)
        clipped = torch.minimum(torch.maximum(latent, torch.as_tensor(self.low)), torch.as_tensor(self.high))
        return through(clipped.round(), clipped)

    def _scale(self) -> Tensor:
        scale = self.code.scale * torch.exp(self.gain)
        return through(portable_scale(scale.detach(), self.code.bits), scale)

    def weight(self) -> Tensor:
        """The weight (m, n)."""
        return (self._integers() * self._scale()[:, :, None]).flatten(1)

    def finish(self) -> GroupInt:
        """The code at the present parameters."""
        with torch.no_grad():
            zero = 0 if self.code.zero is None else self.code.zero[:, :, None].float()
            codes = (self._integers() + zero).flatten(1).to(torch.int8)
            return GroupInt(codes, self._scale(), self.code.zero, self.code.bits)


class BaseLearner(Protocol):
    """What learns the code of a sum."""

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Leaf tensors, and how fast each learns."""
        ...

    def weight(self) -> Tensor:
        """The weight (m, n), differentiable."""
        ...

    def finish(self) -> Any:
        """The code at the present parameters."""
        ...


class ScaledBinaryLearner:
    """Signs with scales of rows and inputs: all scales learn, and the signs of latent weights; salient inputs rest.

    (PTQ1.61, arXiv 2502.13179, section 3.4 learns the scales alone.)
    """

    def __init__(self, code: ScaledBinary, weight: Tensor) -> None:
        """Start at ``code``, made from ``weight`` (m, n) fp32."""
        self.code = code
        self.salient = code.salient.to(weight.device)
        self.kept = code.dense().to(weight.device)[:, self.salient]
        self.scale, self.mean, self.column = (
            part.to(weight.device).float() for part in (code.scale, code.mean, code.column)
        )
        rest = weight[:, ~self.salient] / torch.where(self.column == 0, 1.0, self.column) - self.mean[:, None]
        reach = self.scale[:, None].clamp(min=torch.finfo(torch.float16).tiny)
        side = torch.where(code.signs.to(weight.device), 1.0, -1.0)
        self.latent = side * (side * rest / reach).clamp(0.05, 1.5)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Scales and means of the rows (m,), scales of the inputs (n - k,), and latent signs (m, n - k)."""
        size = float(self.scale.mean())
        width = SCALE_PACE * float(self.column.abs().mean()) if self.column.numel() else 0.0
        return [
            (self.scale, SCALE_PACE * size),
            (self.mean, SCALE_PACE * size),
            (self.column, width),
            (self.latent, 1.0),
        ]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        found = [through(part.detach().half().float(), part) for part in (self.scale, self.mean, self.column)]
        return found[0][:, None], found[1][:, None], found[2]

    def weight(self) -> Tensor:
        """The weight (m, n)."""
        scale, mean, column = self._parts()
        signs = through(torch.where(self.latent >= 0, 1.0, -1.0), self.latent)
        weight = torch.empty(len(self.scale), len(self.salient), device=self.scale.device)
        weight[:, ~self.salient] = (mean + scale * signs) * column
        weight[:, self.salient] = self.kept
        return weight

    def finish(self) -> ScaledBinary:
        """The code at the present parameters."""
        with torch.no_grad():
            signs, scale = self.latent >= 0, self.scale.half()
            signs, scale = torch.where(scale[:, None] < 0, ~signs, signs), scale.abs()
            return replace(self.code, signs=signs, scale=scale, mean=self.mean.half(), column=self.column.half())


class SumLearner:
    """A code and its low-rank correction: both learn, but factors that are integers stay as they are."""

    def __init__(self, code: Sum, base: BaseLearner) -> None:
        """Start at ``code``, of which ``base`` learns the code."""
        self.base = base
        self.correction = code.correction
        self.factors: list[Tensor] = []
        self.constant: Tensor | None = None
        sides = (code.correction.left, code.correction.right)
        if all(isinstance(side, Dense) for side in sides):
            self.factors = [side.dense(torch.float32).clone() for side in sides]
        else:
            self.constant = code.correction.dense()

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Those of the code, and the factors, each at a pace that fits its size."""
        sizes = [float(factor.square().mean().sqrt()) for factor in self.factors]
        return [
            *self.base.parameters(),
            *((f, FACTOR_PACE * size) for f, size in zip(self.factors, sizes, strict=True)),
        ]

    def _stored(self) -> list[Tensor]:
        return [through(factor.detach().to(FACTOR_DTYPE).float(), factor) for factor in self.factors]

    def weight(self) -> Tensor:
        """The weight (m, n)."""
        value = self.base.weight()
        if self.constant is not None:
            return value + self.constant.to(value.device)
        left, right = self._stored()
        return value + left @ right

    def finish(self) -> Sum:
        """The sum at the present parameters."""
        with torch.no_grad():
            if self.factors:
                left, right = (Dense(factor.to(FACTOR_DTYPE)) for factor in self.factors)
                self.correction = LowRank(left, right)
            return Sum(self.base.finish(), self.correction)


class TritLearner:
    """Trit planes: every weight the level nearest to a latent weight, which is learned, as the scales are."""

    def __init__(self, code: TritPlanes, weight: Tensor) -> None:
        """Start at ``code``, made from ``weight`` (m, n) fp32; weights that are exactly zero in both stay zero."""
        self.code = code
        self.combinations = torch.tensor(trit_combinations(code.trits.shape[0]), device=weight.device).float()
        self.scale = code.scale.float().clone()
        self.still = (weight == 0) & (code.trits == 0).all(0)
        value = code.dense().to(weight.device)
        self.latent = weight.clone()
        moved = self._nearest(self.latent)
        self.latent = torch.where(self._value(moved) == value, weight, value)

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.repeat_interleave(self.code.group, dim=2)[:, :, : self.code.trits.shape[2]]

    def _nearest(self, latent: Tensor) -> Tensor:
        """Trits (K, m, n) fp32 of the level nearest to each weight; ties go to the first combination."""
        with torch.no_grad():
            scale = self._spread(self.scale.half().float())
            best = torch.full_like(latent, torch.inf)
            trits = torch.zeros_like(scale)
            for combination in self.combinations:
                distance = (latent - (scale * combination[:, None, None]).sum(0)).abs()
                closer = distance < best
                best = torch.where(closer, distance, best)
                trits = torch.where(closer, combination[:, None, None], trits)
            return trits.masked_fill(self.still, 0)

    def _value(self, trits: Tensor) -> Tensor:
        scale = through(self.scale.detach().half().float(), self.scale)
        return (trits * self._spread(scale)).sum(0)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Latent weights (m, n) and scales (K, m, groups), each at a pace that fits its size."""
        return [
            (self.latent, float(self.scale.abs().mean())),
            (self.scale, SCALE_PACE * float(self.scale.abs().mean())),
        ]

    def weight(self) -> Tensor:
        """The weight (m, n)."""
        value = self._value(self._nearest(self.latent))
        return value + (self.latent - self.latent.detach()).masked_fill(self.still, 0)

    def finish(self) -> TritPlanes:
        """The code at the present parameters, in canonical order."""
        with torch.no_grad():
            trits, scale = self._nearest(self.latent).to(torch.int8), self.scale.half()
            order = scale.abs().argsort(dim=0, descending=True, stable=True)
            trits = torch.where(self._spread(scale) < 0, -trits, trits).gather(0, self._spread(order))
            return TritPlanes(trits, scale.abs().gather(0, order), self.code.group)


class SignLearner:
    """Partial binarization: signs of latent weights, which are learned; salient weights rest.

    Means and scales follow from the latent weights in closed form (PB-LLM, arXiv 2310.00034, section 3.4: a scale is
    the mean distance from the mean), except that they keep the difference and the ratio to it that they started with.
    (Learning them as well was tried: it gave more loss.)
    """

    def __init__(self, code: PartialBinary, weight: Tensor) -> None:
        """Start at ``code``, made from ``weight`` (m, n) fp32."""
        self.code = code
        self.salient = code.salient.to(weight.device)
        self.still = code.dense().to(weight.device).masked_fill(~self.salient, 0)
        self.binary = (~self.salient).float()
        self.count = self._sums(self.binary).clamp(min=1)
        scale = code.scale.to(weight.device).float()
        mean = torch.zeros_like(scale) if code.mean is None else code.mean.to(weight.device).float()
        signs, centre = code.signs.to(weight.device), self._spread(mean)
        # A weight on the other side of its mean starts a little on the side of its sign.
        inside = (INSIDE * self._spread(scale)).clamp(min=SMALLEST_REACH)
        side = torch.where(signs, centre + inside, centre - inside)
        self.latent = torch.where((weight >= centre) == signs, weight, side)
        self.shift, self.ratio = torch.zeros_like(mean), torch.ones_like(scale)
        first_mean, first_scale = self._closed()
        self.shift = mean - first_mean
        self.ratio = torch.where(first_scale > 0, scale / first_scale.clamp(min=torch.finfo(scale.dtype).tiny), 1.0)

    def _sums(self, x: Tensor) -> Tensor:
        """Sums (m, G) of ``x`` (m, n) over groups."""
        short = -x.shape[1] % self.code.group
        return torch.nn.functional.pad(x, (0, short)).view(len(x), -1, self.code.group).sum(2)

    def _spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.code.group, dim=1)[:, : self.salient.shape[1]]

    def _closed(self) -> tuple[Tensor, Tensor]:
        """Means and scales (m, G), not yet rounded."""
        mean = self._sums(self.latent * self.binary) / self.count
        if self.code.mean is None:
            mean = torch.zeros_like(mean)
        scale = self._sums((self.latent - self._spread(mean)).abs() * self.binary) / self.count
        return mean + self.shift, scale * self.ratio

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Means and scales (m, G) as they are stored, differentiable straight through."""
        mean, scale = self._closed()
        return through(mean.detach().half().float(), mean), through(scale.detach().half().float(), scale)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Latent weights (m, n), at a pace that fits their size."""
        return [(self.latent, float(self.code.scale.float().mean()))]

    def weight(self) -> Tensor:
        """The weight (m, n)."""
        mean, scale = (self._spread(x) for x in self._halves())
        value = torch.where(self.latent >= mean, scale, -scale) + mean
        return torch.where(self.salient, self.still, value + (self.latent - self.latent.detach()))

    def finish(self) -> PartialBinary:
        """The code at the present parameters."""
        with torch.no_grad():
            mean, scale = self._halves()
            signs = (self.latent >= self._spread(mean)) & ~self.salient
            stored = None if self.code.mean is None else mean.half()
            return replace(self.code, signs=signs, scale=scale.half(), mean=stored)
