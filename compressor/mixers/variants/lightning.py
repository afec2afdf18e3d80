"""Lightning attention as HALO converts to it: fixed decays, normed queries and keys, a normed and gated output.

Source: Qin et al., "Lightning Attention-2", arXiv 2401.04658 (the layer); HALO and HypeNet, arXiv 2601.22156 (the
conversion).

The paper: S_t = gamma_h S_{t-1} + k_t^T v_t with a fixed gamma for each head; queries and keys are normed, then
rotated; no feature map; RMSNorm of the read-out, times sigmoid(W_g x). Every key head is first copied for each
query head that used it. A quarter of the layers stays softmax; those lose their rotation, and their logits grow
with the position.

Ours differs: query heads go on sharing keys, values and state, so a decay belongs to a key head. Queries and keys
are brought to length one, without a gain of their own (that of a q_norm of the model is applied before). The layers
that stay softmax stay as they are: taking their rotation away needs a billion tokens.
"""

from __future__ import annotations

from compressor.mixers.spec import MixerSpec


def lightning(head_dim: int, output_gate: bool) -> MixerSpec:
    """Return the spec; ``output_gate``: whether the output is gated."""
    return MixerSpec(
        "lightning",
        0,
        0,
        "memory",
        head_dim,
        "unit",
        "fixed",
        normaliser="norm",
        output_gate=output_gate,
    )
