"""How narrow each module becomes under a budget of parameters: the same share everywhere, or where it costs least."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compressor.methods.plane_budget import choose_planes
from compressor.methods.transact import Elimination


@dataclass(frozen=True)
class WidthCurve:
    """What the widths of one module cost.

    Attributes:
        losses: width -> loss, in a unit that all modules share; the largest width is the present one.
        price: parameters that one more unit of width takes.
    """

    losses: Mapping[int, float]
    price: int

    @property
    def full(self) -> int:
        """The width as it is."""
        return max(self.losses)


def mlp_curve(elimination: Elimination, neurons: int, price: int, *, unit: float, multiple: int = 1) -> WidthCurve:
    """Return the curve of an MLP from the order in which its neurons are given up.

    Args:
        neurons: how many there are.
        price: parameters of a neuron.
        unit: what a loss is divided by, say tr(W H W^T) over how much the model minds.
        multiple: only widths that are multiples of this, and the present one.
    """
    losses = {neurons - count: loss / unit for count, loss in enumerate(elimination.losses.tolist())}
    return WidthCurve(_multiples(losses, multiple), price)


def value_curve(worths: Tensor, price: int, *, unit: float, multiple: int = 1) -> WidthCurve:
    """Return the curve of attention from the ``worths`` (kv_heads, d) of its values' directions; see `mlp_curve`.

    ``price``: parameters of one dimension in all heads together. Every head has the same width.
    """
    tail = worths.double().sum(0).flip(0).cumsum(0).tolist()
    dim = len(tail)
    losses = {dim - count: loss / unit for count, loss in enumerate([0.0, *tail[:-1]])}
    return WidthCurve(_multiples(losses, multiple), price)


def _multiples(losses: Mapping[int, float], multiple: int) -> dict[int, float]:
    full = max(losses)
    return {width: loss for width, loss in losses.items() if width % multiple == 0 or width == full}


def uniform_widths(curves: Sequence[WidthCurve], share: float) -> list[int]:
    """Return for every module the largest width with at most ``share`` of its parameters, or else its smallest."""
    return [
        max((width for width in curve.losses if width <= share * curve.full + 1e-9), default=min(curve.losses))
        for curve in curves
    ]


def filled_widths(curves: Sequence[WidthCurve], budget: int, together: Sequence[Hashable] | None = None) -> list[int]:
    """Return widths whose parameters add up to ``budget`` at most, with nearly the least sum of losses.

    Args:
        budget: parameters in all.
        together: a name for every module; those of the same name get the same width, and must have the same widths to
            choose from. None: every module for itself.

    Raises:
        ValueError: not even the smallest widths fit.
    """
    names = list(range(len(curves))) if together is None else list(together)
    groups = {name: [curve for curve, own in zip(curves, names, strict=True) if own == name] for name in names}
    losses = [{w: sum(curve.losses[w] for curve in group) for w in group[0].losses} for group in groups.values()]
    prices = [
        {width: float(width * sum(curve.price for curve in group)) for width in group[0].losses}
        for group in groups.values()
    ]
    chosen = dict(zip(groups, choose_planes(losses, prices, budget), strict=True))
    return [chosen[name] for name in names]
