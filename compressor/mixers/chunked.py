"""Softmax over a window and a decaying memory of all that is older, chunk by chunk: in training, prefill and decoding.

For query i, with scores s_ij = q_i . k_j / sqrt(d), features f_q, f_k >= 0 or any sign, and decay g per token:

    window   a_ij = exp(s_ij - max_j s_ij),                 j in the window of i, or a sink
    memory   b_ij = f_q(i) . (f_k(j) * g_{j+1} ... g_i),    j older than the window (or every j <= i)

    shared   y_i = (sum_j a_ij v_j + r_i sum_j b_ij v_j) / (sum_j a_ij + r_i sum_j b_ij)
    sum      y_i = alpha sum_j a_ij v_j / sum_j a_ij  +  beta sum_j b_ij v_j / (sum_j b_ij or 1)

A token enters the memory when it leaves the window, already decayed to the present. All exponents of decays are
differences <= 0, so that nothing overflows however long the text. A value carries a one as its last channel, which
makes numerator and denominator one product. Decoding is the case of a chunk of one token, so that it cannot differ
from prefill.

The shared denominator is LoLCATs' (arXiv 2410.10254, eq. 7); the chunked form, sinks and padding are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6

State = dict[str, Tensor]
"""What a layer remembers, each tensor with the batch first:

memory (B, Hk, f, dv+1), and with a window the last tokens keys (B, Hk, P, d), values (B, Hk, P, dv), features (B,
Hk, P, f), decays (B, Hk, P, 1 or f), rank (B, P) int64; sink_keys (B, Hk, m, d), sink_values (B, Hk, m, dv),
sink_filled (B, m); count (B) int64, the valid tokens so far. Where the memory holds every token, features and decays
are empty.
"""


@dataclass(frozen=True)
class Tokens:
    """The new tokens of a call, and what was made of them.

    Attributes:
        queries: (B, Hk, g, T, d); keys: (B, Hk, T, d); values: (B, Hk, T, dv).
        valid: (B, T) bool, False for padding.
        query_features: (B, Hk, g, T, f); key_features: (B, Hk, T, f). Empty (f = 0) where nothing is remembered.
        log_decay: (B, Hk, T, 1 or f), <= 0: what is kept of the memory when this token comes, in logarithms.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    query_features: Tensor
    key_features: Tensor
    log_decay: Tensor

    def span(self, start: int, stop: int) -> Tokens:
        """Some of the tokens."""
        at = slice(start, stop)
        return Tokens(
            self.queries[..., at, :],
            self.keys[:, :, at],
            self.values[:, :, at],
            self.valid[:, at],
            self.query_features[..., at, :],
            self.key_features[:, :, at],
            self.log_decay[:, :, at],
        )


@dataclass(frozen=True)
class Frame:
    """How window and memory are laid out and joined.

    Attributes:
        window: softmax tokens, the query's own included; 0: none.
        sinks: first valid tokens of a row that stay in the softmax; without a window there are none.
        older: the memory holds what has left the window; else every token up to the query's.
        shared: one denominator for both.
    """

    window: int
    sinks: int
    older: bool
    shared: bool


@dataclass(frozen=True)
class Read:
    """What a query reads.

    Attributes:
        window, memory: unnormalised sums, the weights' sum in the last channel, (B, Hk, g, T, dv+1).
        top: the largest score of the window, by which its weights are scaled down, (B, Hk, g, T, 1).
    """

    window: Tensor
    memory: Tensor
    top: Tensor


def empty_state(tokens: Tokens, frame: Frame) -> State:
    """Return the state before the first token, in the dtypes and on the device of ``tokens``."""
    B, Hk, _, d = tokens.keys.shape
    dv, f, c = tokens.values.shape[-1], tokens.key_features.shape[-1], tokens.log_decay.shape[-1]
    new = tokens.keys.new_zeros
    return {
        "memory": tokens.key_features.new_zeros(B, Hk, f, dv + 1),
        "keys": new(B, Hk, 0, d),
        "values": tokens.values.new_zeros(B, Hk, 0, dv),
        "features": tokens.key_features.new_zeros(B, Hk, 0, f),
        "decays": tokens.log_decay.new_zeros(B, Hk, 0, c),
        "rank": torch.zeros(B, 0, dtype=torch.int64, device=tokens.keys.device),
        "sink_keys": new(B, Hk, frame.sinks, d),
        "sink_values": tokens.values.new_zeros(B, Hk, frame.sinks, dv),
        "sink_filled": torch.zeros(B, frame.sinks, dtype=torch.bool, device=tokens.keys.device),
        "count": torch.zeros(B, dtype=torch.int64, device=tokens.keys.device),
    }


def read_all(
    tokens: Tokens,
    frame: Frame,
    state: State | None = None,
    *,
    chunk: int = 64,
    scale: float = 1.0,
    sink_logits: Tensor | None = None,
) -> tuple[Read, State]:
    """Read window and memory for every new token, and return the state behind the last one.

    Args:
        tokens: T >= 1 new tokens.
        state: what an earlier call returned; None at the beginning of the texts. It is not changed.
        chunk: tokens worked on together; the result does not depend on it beyond rounding.
        scale: of the scores, 1 / sqrt(d) as a rule.
        sink_logits: (Hk, g, s), scores of keys that are always there and have no value.
    """
    state = empty_state(tokens, frame) if state is None else state
    reads = []
    for start in range(0, tokens.keys.shape[2], chunk):
        read, state = _one_chunk(tokens.span(start, start + chunk), frame, state, scale, sink_logits)
        reads.append(read)
    if len(reads) == 1:
        return reads[0], state
    parts = ([getattr(read, name) for read in reads] for name in ("window", "memory", "top"))
    return Read(*(torch.cat(part, -2) for part in parts)), state


def _one_chunk(new: Tokens, frame: Frame, state: State, scale: float, sink_logits: Tensor | None) -> tuple[Read, State]:
    L, P = new.keys.shape[2], state["keys"].shape[2]
    ranks = all_ranks(new, state)
    columns = torch.arange(P + L, device=ranks.device)
    age = columns[P:, None] - columns[None]  # (L, P + L)
    there = (ranks >= 0)[:, None] & (age >= 0)  # (B, L, P + L)
    sink = (ranks < frame.sinks)[:, None]
    near = there & ((age < frame.window) | sink) if frame.window else torch.zeros_like(there)
    keys = torch.cat([state["keys"], new.keys], 2)
    values = torch.cat([state["values"], new.values], 2)
    decays = torch.cat([state["decays"], kept_decay(new)], 2)
    features = torch.cat([state["features"], new.key_features], 2)
    since = decays.cumsum(2)  # log of what is left, from the first cached token on
    old = state["decays"].shape[2]  # P, or 0 where what is cached is in the memory already
    before = since[:, :, old - 1 : old] if old else torch.zeros_like(since[:, :, :1])
    found = _read_window(new.queries, keys, values, near, state, scale, sink_logits) if frame.window else None
    far = there & ~near if frame.older else there
    # only these can have left the window within this call
    at = slice(0, max(0, P + L - frame.window)) if frame.older else slice(P, P + L)
    known = at if frame.older else slice(0, L)
    memory = _read_memory(
        new,
        features[:, :, known],
        values[:, :, at],
        far[..., at],
        since[:, :, known],
        since[:, :, old:],
        before,
        state["memory"],
    )
    state = _next_state(new, frame, state, keys, values, features, decays, since, before, ranks)
    window, top = (torch.zeros_like(memory), torch.zeros_like(memory[..., :1])) if found is None else found
    return Read(window, memory, top), state


def all_ranks(new: Tokens, state: State) -> Tensor:
    """Which valid token of its row each cached and each new token is, (B, P + L) int64; -1 where padded."""
    rank = torch.where(new.valid, state["count"][:, None] + new.valid.cumsum(1) - 1, -1)
    return torch.cat([state["rank"], rank], 1)


def kept_decay(new: Tokens) -> Tensor:
    """The decays of new tokens, none where a token is padding, (B, Hk, L, 1 or f)."""
    return torch.where(new.valid[:, None, :, None], new.log_decay, 0)


def _read_window(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    near: Tensor,
    state: State,
    scale: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax numerators and their sum, shifted by the row's largest score; and that score."""
    filled = state["sink_filled"]
    if filled.shape[1]:
        keys = torch.cat([state["sink_keys"], keys], 2)
        values = torch.cat([state["sink_values"], values], 2)
        near = torch.cat([filled[:, None].expand(-1, near.shape[1], -1), near], 2)
    scores = torch.einsum("bhgid,bhjd->bhgij", queries, keys) * scale
    scores = scores.masked_fill(~near[:, None, None], float("-inf"))
    if sink_logits is not None:
        B, _, _, L, _ = scores.shape
        scores = torch.cat([scores, sink_logits[None, :, :, None].expand(B, -1, -1, L, -1)], -1)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)  # a padded query sees nothing
    weights = (scores - top).exp()
    out = torch.einsum("bhgij,bhjv->bhgiv", weights[..., : values.shape[2]], with_ones(values))
    if sink_logits is not None:
        out = torch.cat([out[..., :-1], weights.sum(-1, keepdim=True)], -1)
    return out, top


def _read_memory(
    new: Tokens,
    features: Tensor,
    values: Tensor,
    far: Tensor,
    since: Tensor,
    now: Tensor,
    before: Tensor,
    memory: Tensor,
) -> Tensor:
    """What the state gives, and what tokens of this chunk and of the cache give that are not in it yet."""
    old = torch.einsum("bhgif,bhfv->bhgiv", new.query_features * (now - before).exp()[:, :, None], memory)
    if not features.shape[-1] or not features.shape[-2]:
        return old
    lost = (now[:, :, :, None] - since[:, :, None]).masked_fill(~far[:, None, :, :, None], 0)  # (B, Hk, L, n, 1 or f)
    if lost.shape[-1] == 1:
        weights = torch.einsum("bhgif,bhjf->bhgij", new.query_features, features) * lost[:, :, None, ..., 0].exp()
    else:
        weights = torch.einsum("bhgif,bhijf->bhgij", new.query_features, features[:, :, None] * lost.exp())
    weights = weights.masked_fill(~far[:, None, None], 0)
    return old + torch.einsum("bhgij,bhjv->bhgiv", weights, with_ones(values))


def _next_state(
    new: Tokens,
    frame: Frame,
    state: State,
    keys: Tensor,
    values: Tensor,
    features: Tensor,
    decays: Tensor,
    since: Tensor,
    before: Tensor,
    ranks: Tensor,
) -> State:
    """Fold into the memory what leaves the window (or is new), and keep the last tokens."""
    L, P = new.keys.shape[2], state["keys"].shape[2]
    kept = max(0, frame.window - 1)
    gone = max(0, P + L - kept)
    end = since[:, :, -1:]
    fold = slice(0, gone) if frame.older else slice(P, P + L)
    known = fold if frame.older else slice(0, L)
    memory = state["memory"] * (end - before).exp().transpose(2, 3)
    first = frame.sinks if frame.older and frame.window else 0  # sinks stay in the window, where there is one
    entering = (ranks[:, fold] >= first)[:, None, :, None]
    weighted = features[:, :, known] * (end - since[:, :, known]).exp() * entering
    memory = memory + torch.einsum("bhjf,bhjv->bhfv", weighted, with_ones(values[:, :, fold]))
    sinks = {name: state[name] for name in ("sink_keys", "sink_values", "sink_filled")}
    if frame.sinks and frame.window and gone:
        slots = torch.arange(frame.sinks, device=ranks.device)
        place = ranks[:, None, :gone] == slots[:, None]  # (B, m, gone)
        one_hot = place.to(keys.dtype)
        sinks = {
            "sink_keys": sinks["sink_keys"] + torch.einsum("bsj,bhjd->bhsd", one_hot, keys[:, :, :gone]),
            "sink_values": sinks["sink_values"] + torch.einsum("bsj,bhjd->bhsd", one_hot, values[:, :, :gone]),
            "sink_filled": sinks["sink_filled"] | place.any(-1),
        }
    return {
        "memory": memory,
        "keys": keys[:, :, gone:],
        "values": values[:, :, gone:],
        "features": features[:, :, gone if frame.older else L :],
        "decays": decays[:, :, gone if frame.older else L :],
        "rank": ranks[:, gone:],
        **sinks,
        "count": state["count"] + new.valid.sum(1),
    }


def with_ones(values: Tensor) -> Tensor:
    """A one as the last channel: (..., dv) -> (..., dv+1)."""
    return torch.cat([values, torch.ones_like(values[..., :1])], -1)


LARGEST = 30.0
"""Of the logarithm of a memory's share: beyond it nothing but the memory would be left anyway."""


def join_shared(read: Read, log_share: Tensor) -> Tensor:
    """Return (B, Hk, g, T, dv): both under one denominator.

    Args:
        log_share: logarithm of what the memory's weights are multiplied by, broadcastable to (B, Hk, g, T, 1).
    """
    total = read.window + read.memory * log_share.clamp_max(LARGEST).exp()
    return total[..., :-1] / total[..., -1:].clamp_min(EPS)


def window_output(read: Read) -> Tensor:
    """Return (B, Hk, g, T, dv): the window's softmax alone."""
    return read.window[..., :-1] / read.window[..., -1:].clamp_min(EPS)


def memory_output(read: Read, normaliser: str) -> Tensor:
    """Return (B, Hk, g, T, dv): the memory alone, divided by what ``spec.NORMALISERS`` says."""
    value, weight = read.memory[..., :-1], read.memory[..., -1:]
    if normaliser == "sum":
        return value / weight.clamp_min(EPS)
    if normaliser == "group":
        value = value - value.mean(-1, keepdim=True)
    if normaliser in ("norm", "group"):
        return value * (value.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return value
