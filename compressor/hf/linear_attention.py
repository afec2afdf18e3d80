"""The attention module of a linearized layer: the projections of the softmax attention it replaces, and a memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressor.hf.linear_cache import linear_state
from compressor.hf.linear_kernels import read_tokens
from compressor.mixers.chunked import Frame, Read, Tokens, join_shared, memory_output, window_output
from compressor.mixers.decays import Decay, small_weights
from compressor.mixers.maps import FeatureMap, running_maximum
from compressor.mixers.spec import MEMORY, WHOLE, WINDOW, MixerSpec

OWN = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
"""Children of a softmax attention that a linearized one goes on with, under their names."""

VECTOR_CHUNK = 16
"""Tokens at once where every channel decays on its own: their decays are held pair by pair."""


class LinearAttention(nn.Module):
    """Attention with a memory of constant size, in place of a softmax attention of the Llama kind.

    New parameters are called ``lin_*`` and stay in fp32; everything else keeps its name, so that a linearized
    checkpoint is a checkpoint of its teacher with some tensors more.

    Args:
        attention: the softmax attention; its projections are used, not copied.
        spec: what to compute.
        layer: index of the layer, for the cache.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, attention: Any, spec: MixerSpec, layer: int) -> None:
        super().__init__()
        for name in OWN:
            if (child := getattr(attention, name, None)) is not None:
                self.add_module(name, child)
        self.spec, self.layer_idx = spec, layer
        self.config = attention.config
        self.head_dim = int(attention.head_dim)
        self.heads: int = attention.q_proj.out_features // self.head_dim
        self.kv_heads: int = attention.k_proj.out_features // self.head_dim
        self.scaling = float(getattr(attention, "scaling", self.head_dim**-0.5))
        self.parts = WHOLE
        with torch.device(attention.q_proj.weight.device if hasattr(attention.q_proj, "weight") else "cpu"):
            self._make_parameters(attention.q_proj.in_features)

    def _make_parameters(self, width: int) -> None:
        spec = self.spec
        if spec.sink_logits:
            self.lin_sinks = nn.Parameter(torch.zeros(self.heads, spec.sink_logits))
        if not spec.remembers:
            return
        if spec.map != "none":
            if not spec.tied:
                self.lin_q = FeatureMap(spec.map, self.heads, self.head_dim, spec.features)
            self.lin_k = FeatureMap(spec.map, self.kv_heads, self.head_dim, spec.features)
        self.lin_decay = Decay(spec.decay, self.kv_heads, width, spec.features, spec.rank)
        if spec.conv:
            taps = torch.full((spec.conv,), 1e-3)
            taps[-1] = 1.0
            self.lin_conv_q = nn.Parameter(taps.repeat(self.heads, self.head_dim, 1))
            self.lin_conv_k = nn.Parameter(taps.repeat(self.kv_heads, self.head_dim, 1))
        if spec.normaliser == "norm":
            self.lin_norm = nn.Parameter(torch.ones(self.heads, self.head_dim))
        if spec.output_gate:
            self.lin_gate = nn.Parameter(small_weights(self.heads * self.head_dim, width))
        if spec.learn_weights and spec.join == "shared":
            self.lin_mix = nn.Parameter(torch.full((self.heads,), math.log(spec.memory_weight)))
            if spec.per_query:
                self.lin_top = nn.Parameter(torch.zeros(self.heads))
                self.lin_query = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        if spec.learn_weights and spec.join == "sum":
            self.lin_weights = nn.Parameter(
                torch.tensor([spec.window_weight, spec.memory_weight]).repeat(self.heads, 1)
            )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return (B, T, D), and no attention weights. Arguments as for :meth:`heads_of`."""
        held = past_key_values if cache is None else cache
        heads = self.heads_of(hidden_states, position_embeddings, attention_mask, held, padding_mask)
        return self.o_proj(heads.flatten(2)), None

    def heads_of(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return what the heads give, (B, T, H, d).

        Args:
            hidden_states: (B, T, D).
            position_embeddings: cosines and sines of the rotary embedding, (B or 1, T, <= d) each.
            attention_mask: of the softmax layers; not looked at.
            past_key_values: the cache (``cache`` from transformers 5.24 on); None: the tokens are the whole text.
            padding_mask: (B, >= T), 0 for padding; its last T columns are those of these tokens.
        """
        B, T, _ = hidden_states.shape
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        held = None if past_key_values is None else linear_state(past_key_values, self.layer_idx)
        state = {} if held is None else {name: x.to(hidden_states.device) for name, x in held.tensors.items()}
        valid = _valid(padding_mask, B, T, hidden_states.device)
        tokens, extra = self._tokens(hidden_states, position_embeddings, valid, state, dtype)
        frame = self._frame()
        sinks = None
        if self.spec.sink_logits:
            sinks = self.lin_sinks.to(dtype).view(self.kv_heads, -1, self.spec.sink_logits)
        chunk = VECTOR_CHUNK if tokens.log_decay.shape[-1] > 1 else max(64, self.spec.window)
        own = {name: tensor for name, tensor in state.items() if not name.startswith("extra_")}
        read, after = read_tokens(
            tokens,
            frame,
            own or None,
            chunk=chunk,
            scale=self.scaling,
            sink_logits=sinks,
            coarse=_coarse(hidden_states),
        )
        if held is not None:
            held.advance({**after, **extra}, T)
        out = self._join(read, tokens.queries).to(hidden_states.dtype)
        out = out.permute(0, 3, 1, 2, 4).reshape(B, T, self.heads, self.head_dim)
        if self.spec.output_gate:
            gate = torch.sigmoid(hidden_states.to(dtype) @ self.lin_gate.to(dtype).T)
            out = out * gate.view_as(out).to(out.dtype)
        return out

    def _frame(self) -> Frame:
        spec = self.spec
        window = 0 if self.parts == MEMORY or spec.join == "memory" else spec.window
        older = spec.join == "shared" and self.parts != MEMORY
        return Frame(window, spec.sinks if window else 0, older, spec.join == "shared")

    def _join(self, read: Read, queries: Tensor) -> Tensor:
        spec = self.spec
        if self.parts == MEMORY or spec.join == "memory":
            return self._memory(read)
        if self.parts == WINDOW or spec.join == "window":
            return window_output(read)
        shape = (self.kv_heads, -1, 1, 1)
        if spec.join == "shared":
            return join_shared(read, self._log_share(read, queries))
        near, far = window_output(read), self._memory(read)
        if not spec.learn_weights:
            return spec.window_weight * near + spec.memory_weight * far
        weights = self.lin_weights.to(near.dtype)
        return weights[:, 0].view(shape) * near + weights[:, 1].view(shape) * far

    def _memory(self, read: Read) -> Tensor:
        out = memory_output(read, self.spec.normaliser)
        if self.spec.normaliser == "norm":
            out = out * self.lin_norm.to(out.dtype).view(self.kv_heads, -1, 1, self.head_dim)
        return out

    def _log_share(self, read: Read, queries: Tensor) -> Tensor:
        """Logarithm of the memory's weight: of each head, and of each query where it is asked for."""
        if not self.spec.learn_weights:
            return read.window.new_tensor(math.log(self.spec.memory_weight))
        shape = (self.kv_heads, -1, 1, 1)
        share = self.lin_mix.to(queries.dtype).view(shape)
        if self.spec.per_query:
            asked = torch.einsum(
                "bhgid,hgd->bhgi", queries, self.lin_query.to(queries.dtype).view(self.kv_heads, -1, self.head_dim)
            )
            share = share - self.lin_top.to(queries.dtype).view(shape) * read.top + asked[..., None]
        return share

    def _tokens(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        valid: Tensor,
        state: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> tuple[Tokens, dict[str, Tensor]]:
        """Queries, keys, values, features and decays of the new tokens, and what they leave to the next ones."""
        spec, (B, T, _) = self.spec, hidden.shape
        q = self.q_proj(hidden).view(B, T, self.heads, self.head_dim)
        k = self.k_proj(hidden).view(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(hidden).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2).to(dtype)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        turned_q, turned_k = (q, k) if rotary is None else (_rotate(q, rotary), _rotate(k, rotary))
        extra: dict[str, Tensor] = {}
        if not spec.remembers or self.parts == WINDOW:
            nothing = v.new_zeros(B, self.kv_heads, T, 0)
            queries = self._grouped(turned_q.to(dtype))
            zero = v.new_zeros(B, self.kv_heads, T, 1)
            return Tokens(queries, turned_k.to(dtype), v, valid, self._grouped_features(nothing), nothing, zero), extra
        log_decay = self.lin_decay(hidden.to(dtype), k.to(dtype))
        first = spec.rope and not spec.conv and not spec.rope_last
        fq, fk = (turned_q, turned_k) if first else (q, k)
        fq, fk = fq.to(dtype), fk.to(dtype)
        if spec.conv:
            fq, extra["extra_conv_q"] = _convolve(fq, self.lin_conv_q, valid, state.get("extra_conv_q"))
            fk, extra["extra_conv_k"] = _convolve(fk, self.lin_conv_k, valid, state.get("extra_conv_k"))
            if spec.rope and not spec.rope_last and rotary is not None:
                fq, fk = _rotate(fq, rotary), _rotate(fk, rotary)
        fq = self._grouped(fq)
        if spec.map != "none":
            fq, fk = (self.lin_k if spec.tied else self.lin_q)(fq), self.lin_k(fk)
        if spec.map == "exp":
            fq = (fq - fq.amax(-1, keepdim=True)).exp()
            fk, lost, extra["extra_highest"] = running_maximum(fk, valid, state.get("extra_highest"))
            log_decay = log_decay + lost
        if spec.rope_last and rotary is not None:
            fq, fk = self._grouped(_rotate(fq.flatten(1, 2), rotary)), _rotate(fk, rotary)
        near_q, near_k = (turned_q, turned_k) if spec.window_rope else (q, k)
        return Tokens(self._grouped(near_q.to(dtype)), near_k.to(dtype), v, valid, fq, fk, log_decay), extra

    def _grouped(self, heads: Tensor) -> Tensor:
        """(B, H, T, x) -> (B, Hk, g, T, x): consecutive query heads share a key head."""
        return heads.view(heads.shape[0], self.kv_heads, -1, *heads.shape[2:])

    def _grouped_features(self, nothing: Tensor) -> Tensor:
        return nothing[:, :, None].expand(-1, -1, self.heads // self.kv_heads, -1, -1)


def _coarse(hidden: Tensor) -> bool:
    """Whether what the memory is made of is rounded to 16 bits anyway."""
    return hidden.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")


def _valid(mask: Tensor | None, rows: int, tokens: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool, device=device)
    return mask[:, -tokens:].to(device).bool()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (B, heads, T, d), of its first channels where cosines are fewer (partial rotary)."""
    cos, sin = (part[:, None].to(x.dtype) for part in rotary)
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _convolve(x: Tensor, taps: Tensor, valid: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal convolution of each channel over time.

    Args:
        x: (B, heads, T, d).
        taps: (heads, d, n), the newest token's last.
        last: (B, heads, n - 1, d), the inputs before; None at the beginning.

    Returns:
        (B, heads, T, d), and the inputs that the next call will need.
    """
    n = taps.shape[-1]
    x = x * valid[:, None, :, None]
    before = x.new_zeros(*x.shape[:2], n - 1, x.shape[-1]) if last is None else last
    whole = torch.cat([before, x], 2)
    windows = whole.unfold(2, n, 1)  # (B, heads, T, d, n)
    return torch.einsum("bhtdn,hdn->bhtd", windows, taps.to(x.dtype)), whole[:, :, whole.shape[2] - (n - 1) :]
