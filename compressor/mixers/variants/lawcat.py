"""LAWCAT: a short convolution in front of a gated linear attention, no softmax at all.

Source: Liu et al., "LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across
Tokens for Long Context Modeling", arXiv 2509.18467, section 3.

The paper: a causal convolution of four taps over each channel of q and of k, which starts as the identity; no
rotation; one Hedgehog map for q and k; a decay for each channel, log g = logsigmoid(W_2 W_1 x + b) / 16 with an
inner width of 16; the sum of the weights as denominator. A window is an option; its main results have none.

Ours differs: queries that share a key head share its map (the paper's code first repeats the keys). With a window,
it and the memory have one denominator, as in LoLCATs, so that short texts stay exact. The features are as many as a
head's channels unless asked otherwise; a gate is made for each of them, so no width is ruled out.
"""

from __future__ import annotations

from compressor.mixers.maps import feature_width
from compressor.mixers.spec import MixerSpec


def lawcat(head_dim: int, window: int, sinks: int, features: float, taps: int, gate_rank: int) -> MixerSpec:
    """Return the spec; ``features`` is relative to ``head_dim``; without a window there are no sinks either."""
    return MixerSpec(
        "lawcat",
        window,
        sinks if window else 0,
        "shared" if window else "memory",
        feature_width(head_dim, features),
        "hedgehog",
        "lowrank",
        gate_rank,
        rope=False,
        conv=taps,
        tied=True,
    )
