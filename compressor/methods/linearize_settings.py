"""The settings of the linearizing methods: one frozen class each; the descriptions are help and recipe schema.

What all of them take is in ``linearize_base.py``, the published methods in ``linearize_variants.py``, those that end as
layers of stock transformers in ``linearize_native.py``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods.linearize_base import LinearizeSettings
from compressor.methods.linearize_native import NATIVE
from compressor.methods.linearize_variants import PUBLISHED
from compressor.mixers.maps import feature_width
from compressor.mixers.spec import MixerSpec

__all__ = ["LINEARIZE_METHODS", "LinearizeSettings", "WindowSinkSettings", "WindowedSettings"]


class WindowSinkSettings(LinearizeSettings):
    """Softmax over a window and a few first tokens, and nothing else: the baseline."""

    window: int = Field(64, ge=1, description="tokens that are attended to exactly, the newest included")
    sinks: int = Field(4, ge=0, description="first tokens of the text that are attended to for ever")

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """Window and sinks."""
        return MixerSpec(method, self.window, self.sinks, "window")


class WindowedSettings(WindowSinkSettings):
    """Window, sinks, and a decaying memory of everything older under one denominator."""

    features: float = Field(2.0, gt=0, le=8, description="width of the feature maps, relative to that of a head")
    gate: Literal["scalar", "fixed", "none"] = Field(
        "scalar", description="decay of the memory: learned from the text, fixed, or none"
    )
    rope: bool = Field(True, description="rotate the memory's queries and keys as well")

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """The default composition (docs/linearize.md)."""
        return MixerSpec(
            method,
            self.window,
            self.sinks,
            "shared",
            feature_width(head_dim, self.features),
            "hedgehog",
            self.gate,
            rope=self.rope,
            per_query=True,
        )


LINEARIZE_METHODS: dict[str, type[LinearizeSettings]] = {
    "windowed": WindowedSettings,
    "window-sink": WindowSinkSettings,
    **PUBLISHED,
    **NATIVE,
}
"""Method -> its settings."""
