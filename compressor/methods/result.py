"""What a method returns, and how one is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from compressor.formats.representation import Representation
from compressor.methods.settings import PruneSettings
from compressor.methods.statistics import InputStatistics


@dataclass(frozen=True)
class RowGrid:
    """Integer codes on one asymmetric grid per row: ``weight = scale * (codes - zero)`` in fp32, exactly.

    Attributes:
        codes: (m, n) uint8; a pruned weight has its row's ``zero``.
        scale: (m,) fp32, every value representable in fp16.
        zero: (m,) uint8.
        bits: codes are below 2 ** bits.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: (m, n) fp32, exactly zero wherever ``mask`` is False.
        mask: (m, n) bool, True = kept. A kept weight may be zero.
        codes: None, or the codes of a joint quantization.
        notes: sentences about anything unusual.
    """

    weight: Tensor
    mask: Tensor
    codes: RowGrid | None = None
    notes: tuple[str, ...] = ()


class Solve(Protocol):
    """A pruning method. ``settings`` is the method's own class; see docs/design.md 2.2."""

    def __call__(
        self,
        weight: Tensor,
        stats: InputStatistics | None,
        settings: Any,
        sparsity: float | None,
        frozen: Tensor | None = None,
    ) -> Pruned:
        """Prune ``weight`` (m, n) fp32; it is not modified. ``frozen`` (m, n) bool: pruned before, must stay zero."""
        ...


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Attributes:
        code: the form in which it is stored; its ``dense()`` is the value.
        notes: sentences about anything unusual.
    """

    code: Representation
    notes: tuple[str, ...] = ()


class Quantize(Protocol):
    """A quantizing method. ``settings`` is the method's own class."""

    def __call__(
        self, weight: Tensor, stats: InputStatistics | None, settings: Any, frozen: Tensor | None = None
    ) -> Quantized:
        """Quantize ``weight`` (m, n) fp32; it is not modified.

        Args:
            stats: of its input; None for a data-free method, or where too few tokens reached the layer.
            frozen: (m, n) bool, positions pruned before: they stay zero where the format can say zero.

        Raises:
            FactorizationError: the statistics are of no use; call again with ``stats=None``.
        """
        ...


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`.

    Attributes:
        settings: its settings class.
        solve: the method.
    """

    settings: type[PruneSettings]
    solve: Solve
