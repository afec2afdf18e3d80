"""Low-rank updates of linear layers: W x + (alpha / r) B A x, with B = 0 at first (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compressor.engine.sharding import whole

ALPHA = 2.0
"""alpha / r: LoLCATs, Lizard and others take alpha = 2 r."""


class LoraLinear(nn.Module):
    """A frozen linear and what is learned on top of it, in fp32."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        bound = (3 / base.in_features) ** 0.5
        drawn = (torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound
        device = base.weight.device
        self.lora_a = nn.Parameter(drawn.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def weight(self) -> Tensor:
        """The matrix that it stands for, whole, in fp32; not differentiable."""
        base, a, b = (whole(tensor.detach()) for tensor in (self.base.weight, self.lora_a, self.lora_b))
        return base.float() + ALPHA * (b @ a)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        update = (x.to(self.lora_a.dtype) @ self.lora_a.T) @ self.lora_b.T
        out: Tensor = self.base(x)
        return out + (ALPHA * update).to(out.dtype)


def add_lora(model: nn.Module, paths: Iterable[str], rank: int, seed: int) -> dict[str, LoraLinear]:
    """Put low-rank updates on linears of ``model``, and return them by their paths."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        made[path] = LoraLinear(linear, min(rank, *linear.weight.shape), generator)
        model.set_submodule(path, made[path])
    return made
