"""LoLCATs: a short softmax window and a plain linear attention under one denominator.

Source: Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models", arXiv 2410.10254, eq. 6 and 7.

The paper: Hedgehog features of rotated queries and keys, [softmax(x W), softmax(-x W)] with W of d x d/2 per query
head; the last 64 tokens by softmax, weighted by a learned gamma = sigmoid(a) that starts at 0.1; older tokens by
the linear attention; one denominator; no decay, no sinks.

Ours differs: the keys' map is one for each key head, not for each query head that shares it, so that the state is
as many times smaller. The window slides token by token in training as in decoding; the paper's "terrace" of blocks
sees 64 to 128 tokens in training, which makes prefill and decoding two different models. The learned weight is one of
the memory, from 1 / 0.1 = 10 on, which is the same ratio without the bounds of a sigmoid. The state is in fp32.
"""

from __future__ import annotations

from compressor.mixers.maps import feature_width
from compressor.mixers.spec import MixerSpec


def lolcats(head_dim: int, window: int, features: float) -> MixerSpec:
    """Return the spec; ``features`` is relative to ``head_dim`` (1 in the paper)."""
    width = feature_width(head_dim, features)
    return MixerSpec("lolcats", window, 0, "shared", width, "hedgehog", memory_weight=10.0)
