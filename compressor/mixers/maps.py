"""Feature maps: what stands for exp(q . k) in a memory that must not know its keys one by one.

Weights are plain parameters, never ``nn.Linear``: nothing that compresses linears should find them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAPS = ("hedgehog", "relu", "dense", "exp", "softmax", "unit")
"""hedgehog: softmax of x W and of -x W, side by side (arXiv 2402.04347). relu: max(x W + b, 0) (T2R). dense: the
same, each output from the channels of all heads (SUPRA). exp: exp(x W) below a running maximum (ReGLA). softmax:
over the channels, nothing learned (Liger). unit: x / |x|, nothing learned (Lightning)."""

PLAIN = ("softmax", "unit")
"""Those without weights: as many features as channels."""


class FeatureMap(nn.Module):
    """One map for each head: (B, heads, ..., T, d) -> (B, heads, ..., T, f).

    Args:
        kind: one of :data:`MAPS`; ``exp`` gives logarithms, to be shifted by the caller (:func:`running_maximum`).
        heads: heads with weights of their own.
        width: d, of the inputs.
        features: f, of the outputs; those of :data:`PLAIN` have no choice but d.
    """

    def __init__(self, kind: str, heads: int, width: int, features: int) -> None:
        super().__init__()
        self.kind = kind
        if kind in PLAIN:
            return
        if kind == "dense":
            one = torch.eye(width) if width == features else first_weights(width, features)  # SUPRA's start
            self.weight = nn.Parameter(torch.eye(heads).kron(one))  # (heads d, heads f)
            self.bias = nn.Parameter(torch.zeros(heads * features))
            return
        columns = features // 2 if kind == "hedgehog" else features
        self.weight = nn.Parameter(first_weights(width, columns).repeat(heads, 1, 1))  # (heads, d, columns)
        if kind == "relu":
            self.bias = nn.Parameter(torch.zeros(heads, 1, columns))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, heads, g, T, d) or (B, heads, T, d).

        Where g is there, the weights are those of heads * g heads, or of ``heads``, which g of them then share.
        """
        if self.kind == "softmax":
            return x.softmax(-1)
        if self.kind == "unit":
            return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        if self.kind == "dense":
            return self._all_heads(x)
        groups = (x.shape[1], -1) if x.dim() == 5 else (-1,)
        y = x @ self.weight.reshape(*groups, *self.weight.shape[1:]).to(x.dtype)
        if self.kind == "hedgehog":
            return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
        if self.kind == "relu":
            return (y + self.bias.reshape(*groups, *self.bias.shape[1:]).to(x.dtype)).relu()
        return y

    def _all_heads(self, x: Tensor) -> Tensor:
        heads = x.shape[1:-2]
        flat = x.flatten(1, -3).transpose(1, 2).flatten(2)  # (B, T, heads d)
        y: Tensor = (flat @ self.weight.to(x.dtype) + self.bias.to(x.dtype)).relu()
        return y.view(*y.shape[:2], heads.numel(), -1).transpose(1, 2).reshape(*x.shape[:-1], -1)


def feature_width(head_dim: int, relative: float) -> int:
    """Features for heads of ``head_dim`` channels, an even number."""
    return max(2, 2 * round(head_dim * relative / 2))


def first_weights(width: int, columns: int) -> Tensor:
    """Where a map starts, (width, columns): orthonormal columns that treat all channels alike, a cosine basis.

    The identity, the published start, learns worse: on a layer that attends to all old tokens alike it stood at three
    times the error after the same training. Cut short it would also see only one of each pair of channels that a
    rotation turns. With more columns than channels the basis is repeated, each time at another scale.
    """
    rows = torch.arange(width)[:, None] + 0.5
    basis = torch.cos(torch.pi / width * rows * torch.arange(width)[None]) * (2 / width) ** 0.5
    basis[:, 0] /= 2**0.5
    return torch.cat([basis * 2.0**copy for copy in range(-(-columns // width))], 1)[:, :columns]


FLOOR = -50.0
"""Below any sensible logarithm: where a running maximum starts, and what padding counts as."""


def running_maximum(logs: Tensor, valid: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(logs - m_t) and what m_t costs the memory, for m_t the maximum over all channels up to token t.

    The maximum over a whole text, as published for training, would let later tokens change earlier ones.

    Args:
        logs: (B, H, T, f).
        valid: (B, T) bool, False for padding, which raises no maximum.
        last: (B, H), m of the token before the first; None at the beginning.

    Returns:
        Features (B, H, T, f) in (0, 1]; the logarithm of what is kept of the memory, m_{t-1} - m_t <= 0, (B, H, T, 1);
        m of the last token, (B, H).
    """
    own = logs.amax(-1).clamp_min(FLOOR).masked_fill(~valid[:, None], FLOOR)  # (B, H, T)
    start = torch.full_like(own[:, :, :1], FLOOR) if last is None else last[..., None].to(own.dtype)
    highest = torch.cat([start, own], -1).cummax(-1).values
    features = (logs - highest[:, :, 1:, None]).clamp_max(0).exp()
    return features, (highest[:, :, :-1] - highest[:, :, 1:])[..., None], highest[:, :, -1]
