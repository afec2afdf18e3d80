"""How a memory forgets: log g <= 0 for each new token, from the hidden states that the attention is given.

All of it is computed in fp32 or better, in logarithms: 0.998 a token is nothing that half precision can hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

DECAYS = ("none", "fixed", "scalar", "layer", "lowrank", "pooled", "refined")
"""none: 1. fixed: a constant per head (Lightning, ALiBi's slopes). scalar: one gate per head and token. layer: one
per token (Lizard). lowrank: one per channel through a narrow product (LAWCAT, GLA). pooled: per channel, from the
key itself, nothing learned (Liger). refined: per channel, between g^2 and 1 - (1 - g)^2 (ReGLA)."""

START = 0.998
"""What a gate keeps at first: half of the memory after 350 tokens."""

DAMPED = 16.0
"""Divisor of the logarithm where a gate is not started at :data:`START` (GLA's)."""


class Decay(nn.Module):
    """One of :data:`DECAYS`: hidden states (B, T, D) -> log g (B, heads, T, 1 or f).

    Args:
        kind: which.
        heads: heads of the memory.
        width: D, of the hidden states.
        features: f, channels of the memory; used where every channel has a gate.
        rank: inner width of ``lowrank``.
    """

    def __init__(self, kind: str, heads: int, width: int, features: int, rank: int) -> None:
        super().__init__()
        self.kind, self.heads, self.features = kind, heads, features
        open_at = math.log(START / (1 - START))
        if kind in ("scalar", "layer"):
            gates = heads if kind == "scalar" else 1
            self.weight = nn.Parameter(torch.zeros(gates, width))
            self.bias = nn.Parameter(torch.full((gates,), open_at))
        elif kind == "lowrank":
            self.inner = nn.Parameter(small_weights(rank, width))
            self.outer = nn.Parameter(small_weights(heads * features, rank))
            self.bias = nn.Parameter(torch.full((heads * features,), open_at - math.log(DAMPED)))
        elif kind == "refined":
            self.weight = nn.Parameter(small_weights(heads * features, width))
            self.refine = nn.Parameter(small_weights(heads * features, width))
            self.bias = nn.Parameter(torch.full((heads * features,), open_at))

    def forward(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Return log g.

        Args:
            hidden: (B, T, D), what the attention is given.
            keys: (B, heads, T, d), not rotated; ``pooled`` makes its gate of them.
        """
        B, T, _ = hidden.shape
        if self.kind == "none":
            return hidden.new_zeros(B, self.heads, T, 1)
        if self.kind == "fixed":
            return slopes(self.heads, hidden).view(1, -1, 1, 1).expand(B, -1, T, 1)
        if self.kind == "pooled":
            return logsigmoid(keys) / DAMPED
        if self.kind in ("scalar", "layer"):
            gate = logsigmoid(hidden @ self.weight.to(hidden.dtype).T + self.bias.to(hidden.dtype))
            return gate.transpose(1, 2)[..., None].expand(B, self.heads, T, 1)
        if self.kind == "lowrank":
            inner = hidden @ self.inner.to(hidden.dtype).T
            gate = logsigmoid(inner @ self.outer.to(hidden.dtype).T + self.bias.to(hidden.dtype)) / DAMPED
        else:
            gate = self._refined(hidden)
        return gate.view(B, T, self.heads, self.features).transpose(1, 2)

    def _refined(self, hidden: Tensor) -> Tensor:
        """(1 - r) g^2 + r (1 - (1 - g)^2): reaches 0 and 1 while the gates below it still have a slope."""
        g = torch.sigmoid(hidden @ self.weight.to(hidden.dtype).T + self.bias.to(hidden.dtype))
        r = torch.sigmoid(hidden @ self.refine.to(hidden.dtype).T)
        return ((1 - r) * g.square() + r * g * (2 - g)).clamp_min(1e-6).log()


def slopes(heads: int, like: Tensor) -> Tensor:
    """Fixed log decays (heads,): -2^(-8 h / heads), h = 1 ... heads, as in ALiBi and Lightning attention."""
    number = torch.arange(1, heads + 1, device=like.device, dtype=like.dtype)
    return -torch.pow(2.0, -8.0 * number / heads)


def small_weights(*shape: int) -> Tensor:
    """A fixed small start, N(0, 0.006): drawn from a generator of its own, the global one is never touched."""
    drawn = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(20250918), device="cpu") * 0.006
    return drawn.to(torch.get_default_device())
