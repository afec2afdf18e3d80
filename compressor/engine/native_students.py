"""Students that are layers of stock transformers (docs/linearize-native.md), for ``engine/transfer.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.engine.native_start import settle
from compressor.engine.students import Example
from compressor.hf.native import GATES, student_layer

FITTED = 6144
"""Tokens that the closed-form start is fitted to."""


class InPlace(nn.Module):
    """A stock layer, called as the attention it stands for is: masks and positions are passed over."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D), in the same dtype; the layer itself computes in fp32."""
        out: Tensor = self.layer(hidden_states.float())
        return out.to(hidden_states.dtype), None


@dataclass(frozen=True)
class NativeStudents:
    """Mamba-2 or gated delta net layers, which share nothing with the attention and are trained as a whole.

    Attributes:
        config: the source's config.json.
        method: one of :data:`compressor.hf.native.METHODS`.
    """

    config: Mapping[str, Any]
    method: str
    parts: tuple[str, ...] = ()
    mixed: bool = False
    fitted: int = FITTED

    def make(self, attention: nn.Module, layer: int) -> nn.Module:
        """The stock layer, started from the attention's weights."""
        return InPlace(student_layer(self.config, self.method, layer, attention))

    def start(self, student: nn.Module, attention: nn.Module, examples: Sequence[Example]) -> None:
        """Fit in closed form what weights do not say."""
        hidden, target = (torch.cat(each) for each in ([e.hidden for e in examples], [e.answer for e in examples]))
        settle(student.get_submodule("layer"), attention, hidden, target)

    def new(self, student: nn.Module) -> dict[str, nn.Parameter]:
        """Everything, by its name in the stock layer."""
        return dict(student.get_submodule("layer").named_parameters())

    def is_gate(self, name: str) -> bool:
        """The decays, and the steps that multiply them."""
        return name in GATES

    def take(self, student: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load everything."""
        student.get_submodule("layer").load_state_dict(tensors)

    def use(self, student: nn.Module, parts: str) -> None:
        """There is only the whole."""
