"""Lizard: a gated linear attention over everything, and a window with learned sinks beside it.

Source: Nguyen et al., "Lizard: An Efficient Linearization Framework for Large Language Models", arXiv 2507.09025,
section 3.

The paper: y = gated + alpha anchor. Gated: Hedgehog features, one decay sigmoid(W x_t) per token and layer, its own
denominator, every token, no rotation. Anchor: softmax over the last 128 tokens, not rotated, with 4 learned logits
that only enlarge its denominator. So no text is ever exact, however short.

Ours differs: the features are Hedgehog's softmax rather than bare exponentials, which overflow for large keys. The
decay starts at 0.998 rather than 0.5, which forgets too fast to learn from. Both terms have a weight for each head,
from 1 on; the paper has one alpha.
"""

from __future__ import annotations

from compressor.mixers.maps import feature_width
from compressor.mixers.spec import MixerSpec


def lizard(head_dim: int, window: int, sink_logits: int, features: float) -> MixerSpec:
    """Return the spec; ``features`` is relative to ``head_dim`` (1 in the paper)."""
    return MixerSpec(
        "lizard",
        window,
        0,
        "sum",
        feature_width(head_dim, features),
        "hedgehog",
        "layer",
        rope=False,
        window_rope=False,
        sink_logits=sink_logits,
    )
