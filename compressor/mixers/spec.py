"""What a linearized attention layer computes, as data: a method is a choice of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

WHOLE, WINDOW, MEMORY = "whole", "window", "memory"
"""Which parts of a layer are at work: both, or one alone (for the ablation, and for training the memory)."""

NORMALISERS = ("sum", "norm", "group", "none")
"""What a memory's read-out is divided by where it stands alone. sum: the sum of the weights. norm: its root mean
square over the channels of a head, and each channel is scaled by a learned number. group: its standard deviation,
after its mean was taken away. none: nothing."""


@dataclass(frozen=True)
class MixerSpec:
    """The parts of one layer.

    Attributes:
        method: name under which it was asked for.
        window: tokens, the newest included, that are attended to by softmax; 0: none.
        sinks: first tokens of the text that stay in the softmax for ever.
        join: how window and memory become one output. ``shared``: one denominator; the memory holds what has left the
            window. ``sum``: each has its own, and the memory holds every token. ``memory``, ``window``: one of them
            alone.
        features: width of the feature maps' output per head.
        map: feature map (``maps.py``).
        decay: how the memory forgets (``decays.py``).
        rank: inner width of a low-rank decay.
        rope: whether the memory's queries and keys are rotated.
        window_rope: whether the window's are.
        normaliser: what the memory's read-out is divided by where it stands alone, one of :data:`NORMALISERS`.
        conv: taps of a causal convolution over the memory's queries and keys; 0: none.
        sink_logits: learned logits per head that only enlarge the window's denominator.
        window_weight: where the weight of the window's output starts in a ``sum``.
        memory_weight: that of the memory's; ``shared``: of the memory's weights beside the window's.
        learn_weights: whether each head learns them.
        per_query: ``shared``: whether the memory's weight also depends on the query and on the window's largest score.
        tied: one feature map for a key head and the query heads that share it.
        rope_last: the memory's features are rotated, rather than what they are made of.
        output_gate: each channel of the output is multiplied by a sigmoid of the hidden states.
    """

    method: str
    window: int
    sinks: int
    join: str
    features: int = 0
    map: str = "none"
    decay: str = "none"
    rank: int = 0
    rope: bool = True
    window_rope: bool = True
    normaliser: str = "sum"
    conv: int = 0
    sink_logits: int = 0
    window_weight: float = 1.0
    memory_weight: float = 1.0
    learn_weights: bool = True
    per_query: bool = False
    tied: bool = False
    rope_last: bool = False
    output_gate: bool = False

    @property
    def remembers(self) -> bool:
        """Whether there is a memory at all."""
        return self.join != WINDOW

    @property
    def exact(self) -> bool:
        """Whether texts that fit the window give the teacher's output, whatever the new parameters are."""
        changed = not self.window_rope or self.sink_logits or self.output_gate
        return self.join in ("shared", WINDOW) and not changed

    def content(self) -> dict[str, Any]:
        """The spec as it is written to config.json."""
        return asdict(self)


def read_spec(content: Mapping[str, Any]) -> MixerSpec:
    """Read what :meth:`MixerSpec.content` wrote.

    Raises:
        ValueError: a key that this version does not know.
    """
    known = {field.name for field in fields(MixerSpec)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"linear attention has unknown settings {unknown}: update compressor")
    return MixerSpec(**content)
