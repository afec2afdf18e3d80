"""ReGLA: exponential features that cannot overflow, a gate that does not saturate, a norm instead of a denominator.

Source: Lu et al., "ReGLA: Refining Gated Linear Attention", arXiv 2502.01578, section 3.

The paper: phi_q(x) = exp(W_q x - max), phi_k(x) = exp(W_k x - max over channels and tokens), divided by a constant
that makes the variance of their product one; a refined decay (1 - r) g^2 + r (1 - (1 - g)^2), g and r sigmoids of
the input; a norm of the read-out.

Ours differs: the keys' maximum is a running one, and the memory is rescaled when it grows. Over a whole text, as
the paper trains, later tokens change earlier outputs, and decoding cannot repeat it; divided by the norm, both are
the same up to what underflows. The norm cancels the constant as well. The decay has a value for each feature; the
paper's is an outer product with one for each output channel too. The paper says nothing of rotary embeddings:
queries and keys are rotated first, as the teacher's are.
"""

from __future__ import annotations

from compressor.mixers.maps import feature_width
from compressor.mixers.spec import MixerSpec


def regla(head_dim: int, features: float, rope: bool) -> MixerSpec:
    """Return the spec; ``features`` is relative to ``head_dim``."""
    width = feature_width(head_dim, features)
    return MixerSpec("regla", 0, 0, "memory", width, "exp", "refined", rope=rope, normaliser="norm")
