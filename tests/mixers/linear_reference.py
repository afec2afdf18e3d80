"""Window and memory as their definition says, token by token: slow, and obviously right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.mixers.chunked import Frame, Tokens


@dataclass(frozen=True)
class Case:
    """Sizes of random tokens."""

    rows: int = 3
    kv_heads: int = 2
    group: int = 2
    tokens: int = 41
    width: int = 4
    value_width: int = 3
    features: int = 5
    decay: str = "scalar"


def random_tokens(case: Case, valid: Tensor | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tokens:
    """Peaky scores, features of one sign, decays between exp(-1) and 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    B, H, g, T = case.rows, case.kv_heads, case.group, case.tokens
    channels = case.features if case.decay == "vector" else 1
    log_decay = -torch.rand(B, H, T, channels, generator=generator, dtype=torch.float64).to(dtype)
    return Tokens(
        2 * normal(B, H, g, T, case.width),
        2 * normal(B, H, T, case.width),
        normal(B, H, T, case.value_width),
        torch.ones(B, T, dtype=torch.bool) if valid is None else valid,
        normal(B, H, g, T, case.features).exp(),
        normal(B, H, T, case.features).exp(),
        torch.zeros_like(log_decay) if case.decay == "none" else log_decay,
    )


def reference(tokens: Tokens, frame: Frame, scale: float, sink_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what queries read: window values (B, Hk, g, T, dv), window weights (B, Hk, g, T), the same of the memory,
    and the largest score of the window (B, Hk, g, T).

    Window weights are relative to the largest score, sink logits included. Padded queries read zeros.
    """
    B, Hk, g, T, _ = tokens.queries.shape
    dv = tokens.values.shape[-1]
    near_values, far_values = (tokens.values.new_zeros(T, B, Hk, g, dv).unbind(0) for _ in range(2))
    near_weights, far_weights, tops = (tokens.values.new_zeros(T, B, Hk, g).unbind(0) for _ in range(3))
    rows: list[list[tuple[Tensor, ...]]] = []
    for b in range(B):
        rows.append([])
        rank = tokens.valid[b].cumsum(0) - 1
        for i in range(T):
            if not tokens.valid[b, i]:
                rows[b].append((near_values[i][b], near_weights[i][b], far_values[i][b], far_weights[i][b], tops[i][b]))
                continue
            older_ones = [j for j in range(i + 1) if tokens.valid[b, j]]
            near = [j for j in older_ones if frame.window and (i - j < frame.window or rank[j] < frame.sinks)]
            far = [j for j in older_ones if not (frame.older and j in near)]
            value, weight, top = _near(tokens, b, i, near, scale, sink_logits)
            rows[b].append((value, weight, *_far(tokens, b, i, far), top))
    parts = [torch.stack([torch.stack([row[i][n] for i in range(T)], 2) for row in rows]) for n in range(5)]
    return tuple(parts)


def _near(
    tokens: Tokens, b: int, i: int, near: list[int], scale: float, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    query = tokens.queries[b, :, :, i]  # (Hk, g, d)
    if not near:
        nothing = query.new_zeros(query.shape[:2])
        return query.new_zeros(*query.shape[:2], tokens.values.shape[-1]), nothing, nothing
    scores = torch.stack([(query * tokens.keys[b, :, None, j]).sum(-1) * scale for j in near], -1)  # (Hk, g, n)
    logits = scores if sink_logits is None else torch.cat([scores, sink_logits], -1)
    top = logits.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    values = torch.stack([tokens.values[b, :, None, j] for j in near], -2)  # (Hk, 1, n, dv)
    return (weights[..., None] * values).sum(-2), (logits - top).exp().sum(-1), top[..., 0]


def _far(tokens: Tokens, b: int, i: int, far: list[int]) -> tuple[Tensor, Tensor]:
    query = tokens.query_features[b, :, :, i]  # (Hk, g, f)
    value = query.new_zeros(*query.shape[:2], tokens.values.shape[-1])
    weight = query.new_zeros(query.shape[:2])
    for j in far:
        between = [n for n in range(j + 1, i + 1) if tokens.valid[b, n]]
        kept = tokens.log_decay[b, :, between].sum(1).exp()  # (Hk, 1 or f)
        one = (query * (tokens.key_features[b, :, j] * kept)[:, None]).sum(-1)  # (Hk, g)
        weight = weight + one
        value = value + one[..., None] * tokens.values[b, :, None, j]
    return value, weight
