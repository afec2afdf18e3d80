"""The settings of the published linearizing methods: what each paper trained with is the default.

All of them are trained as ``windowed`` is, in the same two stages; a paper that knows only the loss of the text has it
here beside the dense model's logits.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

from pydantic import Field

from compressor.methods.linearize_base import LinearizeSettings
from compressor.mixers.spec import MixerSpec
from compressor.mixers.variants.lawcat import lawcat
from compressor.mixers.variants.liger import liger
from compressor.mixers.variants.lightning import lightning
from compressor.mixers.variants.lizard import lizard
from compressor.mixers.variants.lolcats import lolcats
from compressor.mixers.variants.regla import regla
from compressor.mixers.variants.supra import supra


def _paper(name: str, value: float | str) -> Any:
    """The setting of :class:`LinearizeSettings` with another default."""
    setting = copy(LinearizeSettings.model_fields[name])
    setting.default = value
    return setting


def _window(tokens: int, least: int = 1) -> Any:
    return Field(tokens, ge=least, description="tokens that are attended to exactly, the newest included")


def _features() -> Any:
    return Field(1.0, gt=0, le=8, description="width of the feature maps, relative to that of a head")


class LolcatsSettings(LinearizeSettings):
    """A softmax window and a plain linear memory under one denominator (LoLCATs)."""

    keep_attention: float = _paper("keep_attention", 0.0)
    memory_alone: float = _paper("memory_alone", 0.0)
    window: int = _window(64)
    features: float = _features()

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/lolcats.py``."""
        return lolcats(head_dim, self.window, self.features)


class LigerSettings(LinearizeSettings):
    """A softmax window, and a memory gated by its own keys: no new parameters (Liger)."""

    keep_attention: float = _paper("keep_attention", 0.0)
    memory_alone: float = _paper("memory_alone", 0.0)
    lora_rate: float = _paper("lora_rate", 1e-3)
    window: int = _window(64)

    @property
    def stages(self) -> tuple[int, int]:
        """As for every method, but there is nothing to learn in attention transfer: its tokens go to distillation."""
        return (0, 0) if self.train == "none" else (0, sum(super().stages))

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/liger.py``."""
        return liger(head_dim, self.window)


class LizardSettings(LinearizeSettings):
    """A gated memory of everything, and a softmax window with learned sinks beside it (Lizard)."""

    keep_attention: float = _paper("keep_attention", 0.0)
    memory_alone: float = _paper("memory_alone", 0.0)
    rate: float = _paper("rate", 1e-3)
    lora_rate: float = _paper("lora_rate", 5e-4)
    window: int = _window(128)
    sink_logits: int = Field(4, ge=0, description="learned logits per head that only enlarge the window's denominator")
    features: float = _features()

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/lizard.py``."""
        return lizard(head_dim, self.window, self.sink_logits, self.features)


class LawcatSettings(LinearizeSettings):
    """A short convolution and a memory with a gate per channel; no softmax (LAWCAT)."""

    keep_attention: float = _paper("keep_attention", 0.0)
    window: int = Field(0, ge=0, description="tokens that are attended to exactly, the newest included; 0: none")
    sinks: int = Field(0, ge=0, description="first tokens of the text that are attended to for ever, beside a window")
    features: float = _features()
    taps: int = Field(4, ge=1, le=16, description="length of the convolution over queries and keys")
    gate_rank: int = Field(16, ge=1, description="inner width of the gates")

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/lawcat.py``."""
        return lawcat(head_dim, self.window, self.sinks, self.features, self.taps, self.gate_rank)


class SupraSettings(LinearizeSettings):
    """A memory with fixed decays, normed per head; every weight is trained (SUPRA)."""

    keep_attention: float = _paper("keep_attention", 0.0)
    rate: float = _paper("rate", 1e-3)
    train: Literal["auto", "lora", "full", "none"] = _paper("train", "full")
    full_rate: float = _paper("full_rate", 3e-4)
    dense: bool = Field(True, description="feature maps that mix all heads; else one for each head")

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/supra.py``."""
        return supra(head_dim, self.dense)


class ReglaSettings(LinearizeSettings):
    """A memory of exponential features with refined gates, normed (ReGLA)."""

    keep_attention: float = _paper("keep_attention", 0.0)
    rate: float = _paper("rate", 1e-3)
    features: float = _features()
    rope: bool = Field(True, description="rotate the memory's queries and keys")

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/regla.py``."""
        return regla(head_dim, self.features, self.rope)


class LightningSettings(LinearizeSettings):
    """A memory with fixed decays, normed and gated (Lightning attention, as HALO uses it)."""

    rate: float = _paper("rate", 1e-3)
    full_rate: float = _paper("full_rate", 1e-4)
    output_gate: bool = Field(True, description="gate each channel of the output")

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """``mixers/variants/lightning.py``."""
        return lightning(head_dim, self.output_gate)


PUBLISHED: dict[str, type[LinearizeSettings]] = {
    "lolcats": LolcatsSettings,
    "liger": LigerSettings,
    "lizard": LizardSettings,
    "lawcat": LawcatSettings,
    "supra": SupraSettings,
    "regla": ReglaSettings,
    "lightning": LightningSettings,
}
"""Method -> its settings."""
