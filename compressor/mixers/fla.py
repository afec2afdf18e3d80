"""The memory by a kernel of flash-linear-attention, and all else by our operation.

Its ``chunk_simple_gla`` (one decay a head) and ``chunk_gla`` (one a channel) compute S_t = g_t S_{t-1} + k_t v_t, o_t =
q_t S_t. That is our memory where it holds every token. Where it holds what has left a window of w tokens, the token of
w columns before enters at step t, already decayed to the present. The window, the sinks and the denominators stay
ours: a value's last channel is a one, so that the kernel returns numerator and denominator, whatever is done with
them. It knows as many key heads as query heads: keys are repeated.

Signatures: fla-core 0.6.0. Nothing is imported here; ``hf/linear_kernels.py`` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.mixers.chunked import (
    Frame,
    Read,
    State,
    Tokens,
    all_ranks,
    empty_state,
    kept_decay,
    read_all,
    with_ones,
)

Kernel = Callable[..., tuple[Tensor, Tensor]]


def read_with(
    kernel: Kernel,
    tokens: Tokens,
    frame: Frame,
    state: State | None = None,
    *,
    scale: float = 1.0,
    sink_logits: Tensor | None = None,
) -> tuple[Read, State]:
    """:func:`read_all`, with the memory by ``kernel``: ``chunk_simple_gla``, or ``chunk_gla`` for a decay a channel."""
    state = empty_state(tokens, frame) if state is None else state
    late = max(0, frame.window - 1) if frame.older else 0  # tokens between a token and its entering
    decays = torch.cat([state["decays"], kept_decay(tokens)], 2)
    features = torch.cat([state["features"], tokens.key_features], 2)
    entering, values = _entering(tokens, frame, state, features, decays, late)
    if frame.older and frame.window:  # a token enters after the step's query has read: for a kernel, at the next step
        entered = pad(entering, (0, 0, 1, -1)) * kept_decay(tokens).exp()
        memory, last = _run(kernel, tokens, entered, pad(values, (0, 0, 1, -1)), state["memory"])
        # no product of matrices, which autocast would round to bf16
        last = last + entering[:, :, -1, :, None] * values[:, :, -1, None, :]
    else:
        memory, last = _run(kernel, tokens, entering, values, state["memory"])
    if frame.window:
        read, after = _window_alone(tokens, frame, state, scale, sink_logits)
        read = replace(read, memory=memory)
    else:
        read = Read(torch.zeros_like(memory), memory, torch.zeros_like(memory[..., :1]))
        after = {**state, "count": state["count"] + tokens.valid.sum(1)}
    cached = slice(max(0, features.shape[2] - late), None)
    return read, {**after, "memory": last, "features": features[:, :, cached], "decays": decays[:, :, cached]}


def _entering(
    tokens: Tokens, frame: Frame, state: State, features: Tensor, decays: Tensor, late: int
) -> tuple[Tensor, Tensor]:
    """What enters the memory at each new token, decayed to that token: features (B, Hk, T, f), values (B, Hk, T, dv+1).

    Zeros where nothing does: in the first window of a text, for padding, and for sinks, which stay in the softmax.
    """
    known, T = features.shape[2], tokens.keys.shape[2]
    count = max(0, known - late)
    values = torch.cat([state["values"], tokens.values], 2)[:, :, -known:][:, :, :count]
    first = frame.sinks if frame.older and frame.window else 0
    enters = (all_ranks(tokens, state)[:, -known:][:, :count] >= first)[:, None, :, None]
    entering = features[:, :, :count] * enters
    if late:
        since = decays.double().cumsum(2)  # sums over a whole text, of which small differences are taken
        entering = entering * (since[:, :, late : late + count] - since[:, :, :count]).exp().to(entering.dtype)
    return pad(entering, (0, 0, T - count, 0)), pad(with_ones(values), (0, 0, T - count, 0))


def _run(kernel: Kernel, tokens: Tokens, keys: Tensor, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return what queries read, (B, Hk, g, T, dv+1), and the memory behind the last token."""
    Hk, g = tokens.query_features.shape[1:3]
    dtype = tokens.values.dtype
    gates = kept_decay(tokens)

    def laid_out(x: Tensor) -> Tensor:  # (B, Hk, T, c) -> (B, T, Hk g, c)
        return x.to(dtype).repeat_interleave(g, 1).transpose(1, 2)

    found, last = kernel(
        q=tokens.query_features.to(dtype).flatten(1, 2).transpose(1, 2),
        k=laid_out(keys),
        v=laid_out(values),
        g=laid_out(gates) if gates.shape[-1] > 1 else laid_out(gates)[..., 0],
        scale=1.0,
        initial_state=memory.to(dtype).repeat_interleave(g, 1),
        output_final_state=True,
    )
    B, T, _, width = found.shape
    return found.transpose(1, 2).reshape(B, Hk, g, T, width), last[:, ::g]


def _window_alone(
    tokens: Tokens, frame: Frame, state: State, scale: float, sink_logits: Tensor | None
) -> tuple[Read, State]:
    """Our operation over tokens without features, for what it reads and keeps of the window."""
    plain = replace(
        tokens,
        query_features=tokens.query_features[..., :0],
        key_features=tokens.key_features[..., :0],
        log_decay=tokens.log_decay[..., :1].detach(),
    )
    held = {
        **state,
        "memory": state["memory"][:, :, :0],
        "features": state["features"][..., :0],
        "decays": state["decays"][..., :1].detach(),
    }
    return read_all(plain, frame, held, chunk=max(64, frame.window), scale=scale, sink_logits=sink_logits)
