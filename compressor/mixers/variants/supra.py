"""SUPRA: a linear RNN with fixed decays and a norm instead of a denominator.

Source: Mercat et al., "Linearizing Large Language Models", arXiv 2405.06640, section 3.

The paper: features RoPE(ReLU(W x + b)) with a W that mixes all heads, one for queries and one for keys; a fixed
decay for each head; o_t = GroupNorm(q_t S_t), each head's mean taken away and its deviation divided by; all weights
are then trained on 20 to 100 billion tokens of text.

Ours differs: W starts as the identity. A decay belongs to a key head (-2^(-8 h / heads) in logarithms, ALiBi's
slopes); the paper's code repeats keys and has one for each query head. The keys' factor 1 / sqrt(d) is left out:
the norm cancels it.
"""

from __future__ import annotations

from compressor.mixers.spec import MixerSpec


def supra(head_dim: int, dense: bool) -> MixerSpec:
    """Return the spec; ``dense``: the map mixes all heads, as in the paper, rather than the channels of each."""
    return MixerSpec(
        "supra",
        0,
        0,
        "memory",
        head_dim,
        "dense" if dense else "relu",
        "fixed",
        normaliser="group",
        rope_last=True,
    )
