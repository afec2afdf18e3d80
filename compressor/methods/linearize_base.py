"""The settings that every linearizing method takes; the descriptions are help and recipe schema."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.mixers.spec import MixerSpec

BUDGETS: dict[str, tuple[int, int, int]] = {
    "smoke": (1_000_000, 1_000_000, 0),
    "small": (20_000_000, 20_000_000, 0),
    "medium": (100_000_000, 600_000_000, 0),
    "large": (300_000_000, 1_000_000_000, 1_000_000_000),
}
"""Tokens of attention transfer, of end-to-end distillation, and of the same on longer windows (the last as HALO,
arXiv 2601.22156, shares out 2.3 billion)."""

FULL_FROM = 100_000_000
"""Tokens of distillation from which all weights are worth training; below, low-rank updates forget less."""


class LinearizeSettings(BaseModel):
    """What every linearizing method takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    keep_attention: float = Field(
        0.25, ge=0, description="layers that stay softmax attention: a fraction below 1, or a number of layers"
    )
    keep_layers: tuple[int, ...] = Field((), description="which layers stay softmax attention, instead of a choice")
    select: Literal["kl-add", "kl-replace", "error", "even"] = Field(
        "kl-add",
        description="how they are chosen: kl-add: those whose softmax brings the linearized model closest to the dense "
        "one; kl-replace: those whose replacement alone takes the dense model farthest; error: those that were "
        "matched worst; even: evenly spaced",
    )
    select_tokens: int = Field(16384, ge=1, description="calibration tokens that layers are chosen on")
    budget: Literal["smoke", "small", "medium", "large"] = Field(
        "smoke", description="tokens to train on: smoke 2M, small 40M, medium 700M, large 2.3B (1B in long windows)"
    )
    tokens: int | None = Field(
        None, ge=1, description="tokens to train on, half of them block by block, half end to end; none in long windows"
    )
    long_tokens: int | None = Field(
        None, ge=0, description="tokens of a third stage of training, on longer windows (default: what the budget says)"
    )
    long_seqlen: int | None = Field(
        None, ge=2, description="third stage: tokens in a window (default: 16384, or the model's context)"
    )
    long_rate: float = Field(0.1, gt=0, le=1, description="third stage: learning rates, as a share of those before it")
    batch: int = Field(8, ge=1, description="token windows in a training step")
    rate: float = Field(
        1e-2,
        gt=0,
        lt=1,
        description="attention transfer: learning rate of feature maps and weights; mamba2, gdn: 0 goes by the width",
    )
    gate_rate: float = Field(1e-3, gt=0, lt=1, description="learning rate of decays, in both stages of training")
    memory_alone: float = Field(
        0.5, ge=0, le=1, description="attention transfer: share of steps in which the memory is trained without window"
    )
    train: Literal["auto", "lora", "full", "none"] = Field(
        "auto", description="end to end: low-rank updates of q, k, v, o; all weights; or nothing (auto: by the tokens)"
    )
    rank: int = Field(8, ge=1, description="lora: rank of the updates")
    lora_rate: float = Field(1e-4, gt=0, lt=1, description="lora: learning rate")
    full_rate: float = Field(1e-5, gt=0, lt=1, description="full: learning rate of the weights that the model had")
    new_rate: float = Field(1e-3, gt=0, lt=1, description="end to end: learning rate of what is new")
    cross_entropy: float = Field(0.1, ge=0, description="end to end: weight of the text itself beside the dense model")
    top_k: int = Field(
        0, ge=0, description="end to end: learn from so many logits of the dense model and the rest as one; 0: all"
    )
    store_logits: bool = Field(
        False,
        description="end to end: put the dense model's top-k predictions on disk first, and train without it in memory",
    )
    gradient_checkpointing: bool = Field(
        False, description="end to end: compute activations again instead of keeping them; less memory, more time"
    )

    @property
    def needs_data(self) -> bool:
        """Whether calibration inputs are needed."""
        return True

    @property
    def stages(self) -> tuple[int, int]:
        """Tokens of attention transfer, and of end-to-end distillation."""
        first, second, _ = BUDGETS[self.budget]
        if self.tokens is not None:
            first, second = self.tokens - self.tokens // 2, self.tokens // 2
        return (first, 0) if self.train == "none" else (first, second)

    @property
    def longer(self) -> int:
        """Tokens of end-to-end distillation on longer windows; an absent number of them is the budget's."""
        if self.long_tokens is None:
            return BUDGETS[self.budget][2] if self.tokens is None and self.train != "none" else 0
        return self.long_tokens

    @property
    def trained(self) -> Literal["lora", "full", "none"]:
        """What end-to-end distillation trains."""
        if self.train != "auto":
            return self.train
        return "full" if self.stages[1] + self.longer >= FULL_FROM else "lora"

    def label(self, method: str) -> str:
        """What was asked for, in a few words."""
        if self.keep_layers:
            kept = f"layers {', '.join(map(str, self.keep_layers))} kept"
        else:
            kept = f"{self.keep_attention:g} kept" if self.keep_attention else "none kept"
        return f"{method}, {kept}"

    def transfer_rate(self, hidden: int) -> float:
        """Learning rate of attention transfer for a model of this hidden size, but for the decays."""
        return self.rate

    def mixer(self, method: str, head_dim: int) -> MixerSpec:
        """What a linearized layer computes, for heads of ``head_dim`` channels."""
        raise NotImplementedError
