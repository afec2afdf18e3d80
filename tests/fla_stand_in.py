"""The two kernels of flash-linear-attention that we call, as plain recurrences with its signatures (fla-core 0.6.0)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """q, k (B, T, H, K), v (B, T, H, V), g (B, T, H) in logarithms, states (B, H, K, V); scale 1 / sqrt(K) if None."""
    assert g is not None and g.shape == q.shape[:3] and g_gamma is None
    assert not state_v_first and cu_seqlens is None and cu_seqlens_cpu is None and not kwargs
    return _recurrence(q, k, v, g[..., None].expand_as(q), scale, initial_state, output_final_state)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same with g (B, T, H, K)."""
    assert g.shape == q.shape and not state_v_first and cu_seqlens is None and cu_seqlens_cpu is None
    return _recurrence(q, k, v, g, scale, initial_state, output_final_state)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None, start: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    assert k.shape == q.shape and v.shape == (B, T, H, V) and start is not None and start.shape == (B, H, K, V)
    assert {q.dtype, k.dtype, v.dtype, g.dtype, start.dtype} == {q.dtype}
    scale = K**-0.5 if scale is None else scale
    state, read = start, []
    for t in range(T):
        state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        read.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(read, 1), state if keep else None


def install(monkeypatch: pytest.MonkeyPatch, **kernels: Any) -> None:
    """Let ``import fla.ops.gla`` and ``fla.ops.simple_gla`` find these functions, or others given by name."""
    found = {"chunk_gla": chunk_gla, "chunk_simple_gla": chunk_simple_gla, **kernels}
    for name in ("fla", "fla.ops", "fla.ops.gla", "fla.ops.simple_gla"):
        module: Any = ModuleType(name)
        module.__path__, module.__spec__ = [], None
        monkeypatch.setitem(sys.modules, name, module)
    for name, kernel in found.items():
        monkeypatch.setattr(sys.modules["fla.ops." + name.removeprefix("chunk_")], name, kernel, raising=False)
