"""The values of a converted layer that its teacher's weights do not say, from a few thousand tokens in closed form.

Stock Mamba-2 and gated delta net layers normalize what each head reads from its state, so that the teacher's output
projection finds everything in other sizes. A ridge fit of that projection to the teacher's outputs removes half of the
error before any training, and training starts from there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.methods.cholesky import inverse

GATE = 1.0
DAMP = 1e-3


@torch.no_grad()
def settle(student: nn.Module, attention: nn.Module, hidden: Tensor, target: Tensor) -> None:
    """Fit what of a fresh student can be fitted in closed form, in place.

    - Gated delta net: rows of q and k are scaled to the length they have behind the teacher's norm, where it has one;
      the gates are opened: all of their rows become the vector whose product with the hidden states is nearest to 1.
    - Both: the output projection is fitted to the teacher's outputs, by ridge regression towards where it started.

    Args:
        student: a layer by :func:`compressor.hf.native.student_layer`, fp32.
        attention: the ``self_attn`` it was made from.
        hidden: (windows, length, D) normed hidden states that the attention is given.
        target: (windows, length, D) what the attention returns for them.
    """
    hidden, target = hidden.float(), target.float()
    if hasattr(student, "in_proj_z"):
        if hasattr(attention, "q_norm"):
            _settle_lengths(student, hidden)
        _open_gates(student, hidden)
    _fit_output(student, hidden, target)


def _settle_lengths(student: nn.Module, hidden: Tensor) -> None:
    keys, dim = int(student.key_dim), int(student.head_k_dim)  # type: ignore[arg-type]
    rows = student.get_parameter("in_proj_qkv.weight")[: 2 * keys]
    sizes = (hidden.flatten(0, 1) @ rows.T).square().mean(0).reshape(-1, dim).mean(1).sqrt()
    taps = student.get_parameter("conv1d.weight")
    taps[: 2 * keys] /= sizes.clamp_min(1e-6).repeat_interleave(dim)[:, None, None]


def _open_gates(student: nn.Module, hidden: Tensor) -> None:
    x = hidden.flatten(0, 1)
    direction = _ridge(x, torch.ones(len(x), 1, device=x.device))[:, 0]
    gates = student.get_parameter("in_proj_z.weight")
    gates.copy_((GATE * direction).expand_as(gates))


def _fit_output(student: nn.Module, hidden: Tensor, target: Tensor) -> None:
    out = student.get_submodule("out_proj")
    read: list[Tensor] = []
    hook = out.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    before = student(hidden)
    hook.remove()
    # How large the outputs are is the first thing that the norms have changed.
    size = (before * target).sum() / before.square().sum().clamp_min(1e-30)
    weight = out.get_parameter("weight")
    weight.mul_(size)
    rest = target - student(hidden)
    weight.add_(_ridge(read[0].flatten(0, 1).float(), rest.flatten(0, 1)).T)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Return B (n, m) that minimizes |x B - y|^2 + damp |B|^2 for x (tokens, n) and y (tokens, m)."""
    gram = x.T @ x
    gram.diagonal().add_(DAMP * gram.diagonal().mean())
    return inverse(gram) @ (x.T @ y)
