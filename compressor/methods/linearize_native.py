"""The settings of methods whose layers stock transformers has (docs/linearize-native.md)."""

from __future__ import annotations

from pydantic import Field

from compressor.methods.linearize_base import LinearizeSettings

WIDE = 256
"""Hidden size beyond which attention transfer takes the smaller rate: 64 and 128 want 1e-2, 384 wants 3e-3."""


class NativeSettings(LinearizeSettings):
    """What these methods share: no window, no sinks, no feature maps."""

    rate: float = Field(
        0.0, ge=0, lt=1, description=f"attention transfer: learning rate; 0: 1e-2, 3e-3 for hidden sizes above {WIDE}"
    )
    new_rate: float = Field(3e-3, gt=0, lt=1, description="end to end: learning rate of the converted layers")
    memory_alone: float = Field(0.0, ge=0, le=0, description="there is no window to leave out")

    def transfer_rate(self, hidden: int) -> float:
        """As asked for, or by the width."""
        return self.rate or (3e-3 if hidden > WIDE else 1e-2)


class Mamba2Settings(NativeSettings):
    """Mamba-2 layers in a Granite hybrid, from Llama, Mistral and Qwen2."""


class GdnSettings(NativeSettings):
    """Gated delta nets in a Qwen3.5 text model, from Qwen3."""


NATIVE: dict[str, type[NativeSettings]] = {"mamba2": Mamba2Settings, "gdn": GdnSettings}
"""Method -> its settings."""
