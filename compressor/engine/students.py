"""What takes the place of a block's softmax attention while blocks learn alone: how it is made, started and trained.

``engine/transfer.py`` trains any kind; here is the protocol and the kind with layers of our own. Layers that stock
transformers has are in ``engine/native_students.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.errors import UserError
from compressor.hf.linear_attention import LinearAttention
from compressor.mixers.spec import MEMORY, WHOLE, WINDOW, MixerSpec

STARTS = tuple(float(x) for x in range(4, -13, -1))
"""Logarithms of the memory's weight that are tried at first."""

SHARPNESS = (1.0, 0.3, 0.1)
"""Scales of the feature maps' first weights that are tried."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error up to which an attention counts as the one that the frame computes."""


@dataclass(frozen=True)
class Example:
    """A call of the attention, and what the teacher answers (windows, T, D)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Tensor

    @property
    def hidden(self) -> Tensor:
        """The hidden states (windows, T, D) that the attention is given."""
        states: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return states


def relative_error(student: nn.Module, example: Example) -> Tensor:
    """Relative squared error of the student's answer, a scalar."""
    out = student(*example.args, **example.kwargs)[0]
    wanted = example.answer.float()
    error: Tensor = (out.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
    return error


class Students(Protocol):
    """A kind of student. Each is called as the attention is, and returns a tuple that begins with its answer.

    Attributes:
        parts: those of its parts that can be looked at alone.
        mixed: whether it can be trained with its memory alone.
        fitted: tokens to train on that its start wants to see; 0: a batch that is not trained on is enough.
    """

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def mixed(self) -> bool: ...
    @property
    def fitted(self) -> int: ...

    def make(self, attention: nn.Module, layer: int) -> nn.Module:
        """A fresh student of a loaded attention."""
        ...

    def start(self, student: nn.Module, attention: nn.Module, examples: Sequence[Example]) -> None:
        """Let it begin, in place, where that can be found without training.

        Raises:
            UserError: the attention is not one that such a student can replace.
        """
        ...

    def new(self, student: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, under the names it is stored by."""
        ...

    def is_gate(self, name: str) -> bool:
        """Whether one of these is a decay."""
        ...

    def take(self, student: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put stored values in place of what ``new`` names."""
        ...

    def use(self, student: nn.Module, parts: str) -> None:
        """Let it use one of ``parts`` only, or everything again (``spec.WHOLE``)."""
        ...


@dataclass(frozen=True)
class OwnStudents:
    """Layers of our own: the attention's projections in the frame of a mixer, and new parameters ``lin_*``."""

    spec: MixerSpec
    fitted: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Memory and window, where it has them."""
        return (MEMORY,) * self.spec.remembers + (WINDOW,) * bool(self.spec.window)

    @property
    def mixed(self) -> bool:
        """Whether memory and window are joined."""
        return self.spec.join in ("shared", "sum")

    def make(self, attention: nn.Module, layer: int) -> nn.Module:
        """A linearized attention that shares the projections."""
        return LinearAttention(attention, self.spec, layer)

    def start(self, student: nn.Module, attention: nn.Module, examples: Sequence[Example]) -> None:
        """See that the frame computes this attention, and choose the memory's first weight and sharpness."""
        assert isinstance(student, LinearAttention)
        check_attention(attention, examples[0], student.layer_idx)
        start_memory(student, attention, examples[0])

    def new(self, student: nn.Module) -> dict[str, nn.Parameter]:
        """Everything but the attention's own."""
        return {name: p for name, p in student.named_parameters() if name.startswith("lin_")}

    def is_gate(self, name: str) -> bool:
        """Decays have a name of their own."""
        return name.startswith("lin_decay")

    def take(self, student: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load what is new."""
        student.load_state_dict(tensors, strict=False)

    def use(self, student: nn.Module, parts: str) -> None:
        """Tell the frame."""
        assert isinstance(student, LinearAttention)
        student.parts = parts


def check_attention(attention: nn.Module, example: Example, layer: int) -> None:
    """Refuse an attention that is more than rotated queries, keys, values and a softmax.

    Raises:
        UserError: our frame, given a window over everything, computes something else.
    """
    tokens = example.answer.shape[1]
    plain = LinearAttention(attention, MixerSpec("check", tokens, 0, "window"), layer)
    plain.parts = WHOLE
    with torch.no_grad():
        error = float(relative_error(plain, example)) ** 0.5
    if not error <= TOLERANCE[example.answer.dtype]:
        raise UserError(
            f"the attention of block {layer} ({type(attention).__name__}) has a feature that linearized layers do not "
            f"carry: with a window over the whole text they differ by {error:.2g} of its output",
            fix=f"--keep-layers {layer} leaves it as it is",
        )


@torch.no_grad()
def start_memory(student: LinearAttention, attention: nn.Module, example: Example) -> None:
    """Let the memory begin, in each head, with the weight and the sharpness that help most before anything is learned.

    Where almost nothing is attended to beyond the window that is a weight of almost nothing; where old tokens all
    count alike it is a map that hardly tells them apart. Only where the published starting values are not wanted.
    """
    spec = student.spec
    if not hasattr(student, "lin_mix") or spec.tied:
        return
    tokens = example.answer.shape[1]
    plain = LinearAttention(attention, MixerSpec("check", tokens, 0, "window"), student.layer_idx)
    wanted = plain.heads_of(*example.args, **example.kwargs).float()
    first_q, first_k = student.lin_q.weight.clone(), student.lin_k.weight.clone()
    errors = torch.zeros(len(SHARPNESS), len(STARTS), student.heads, device=wanted.device)
    for i, sharpness in enumerate(SHARPNESS):
        student.lin_q.weight.copy_(first_q * sharpness)
        student.lin_k.weight.copy_(first_k * sharpness)
        for j, start in enumerate(STARTS):
            student.lin_mix.fill_(start)
            given = student.heads_of(*example.args, **example.kwargs).float()
            errors[i, j] = (given - wanted).square().sum((0, 1, 3))
    least, weight = errors.min(1)  # (sharpness, H)
    shared = least.view(len(SHARPNESS), student.kv_heads, -1).sum(-1).argmin(0)  # (Hk): query heads of a key head agree
    chosen = shared.repeat_interleave(student.heads // student.kv_heads)
    scales = torch.tensor(SHARPNESS, device=wanted.device)
    student.lin_q.weight.copy_(first_q * scales[chosen, None, None])
    student.lin_k.weight.copy_(first_k * scales[shared, None, None])
    starts = torch.tensor(STARTS, device=wanted.device)
    student.lin_mix.copy_(starts[weight.gather(0, chosen[None])[0]])
