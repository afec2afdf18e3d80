"""Liger: gates taken from the keys, so that there is nothing new to learn.

Source: Lan et al., "Liger: Linearizing Large Language Models to Gated Recurrent Structures", arXiv 2503.01496,
section 3.

The paper: S_t = G_t . S_{t-1} + k'_t^T v_t with q', k' the softmax over the channels of a head, o_t = q'_t S_t
without a denominator, no rotation; G_t = sigmoid(pool(k_t))^(1/16) for each channel, where the pooling is the
identity in the published code; half of that and half of a softmax over the last 64 tokens make the output. The
memory holds every token.

Ours differs: queries that share a key head share its state, which the paper's code repeats; the numbers are the
same. Decoding keeps the window's keys, and positions count tokens; in the published code neither does.
"""

from __future__ import annotations

from compressor.mixers.spec import MixerSpec


def liger(head_dim: int, window: int) -> MixerSpec:
    """Return the spec: no parameters."""
    return MixerSpec(
        "liger",
        window,
        0,
        "sum",
        head_dim,
        "softmax",
        "pooled",
        rope=False,
        normaliser="none",
        window_weight=0.5,
        memory_weight=0.5,
        learn_weights=False,
    )
