"""The products as operators of torch, so that ``torch.compile`` and CUDA graphs trace through them, and their gradient.

Importing this registers them and needs no Triton. Running one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from compressor.kernels.triton.layouts import Planes
from compressor.kernels.triton.sparse_signs import SparseSigns

LIBRARY = torch.library.Library("compressor", "FRAGMENT")  # type: ignore[no-untyped-call]
PLANES = "triton_planes_linear"
DENSE = "triton_planes_dense"
SIGNS = "triton_signs_linear"

LIBRARY.define(  # type: ignore[no-untyped-call]
    f"{PLANES}(Tensor x, Tensor? bias, Tensor words, Tensor scale, Tensor? zero, int offset, int bits, int run, "
    "int group, int n, ScalarType dtype, bool exact, int[] tile) -> Tensor"
)
LIBRARY.define(  # type: ignore[no-untyped-call]
    f"{DENSE}(Tensor words, Tensor scale, Tensor? zero, int offset, int bits, int run, int group, int n, "
    "ScalarType dtype, ScalarType out) -> Tensor"
)
LIBRARY.define(  # type: ignore[no-untyped-call]
    f"{SIGNS}(Tensor x, Tensor? bias, Tensor words, Tensor scale, Tensor low, Tensor entries, Tensor starts, "
    "Tensor step, Tensor? zero, int middle, bool by_input, int group, int n, ScalarType dtype, bool exact, "
    "int[] tile) -> Tensor"
)


def planes_arguments(planes: Planes) -> tuple[Any, ...]:
    """Return what follows x and bias in a call of the operator for ``planes``, up to the mode."""
    p = planes
    return p.words, p.scale, p.zero, p.offset, p.bits, p.run, p.group, p.n, p.dtype


def signs_arguments(signs: SparseSigns) -> tuple[Any, ...]:
    """Return what follows x and bias in a call of the operator for ``signs``, up to the mode."""
    s = signs
    return s.words, s.scale, s.low, s.entries, s.starts, s.step, s.zero, s.middle, s.by_input, s.group, s.n, s.dtype


def _planes_linear(x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    from compressor.kernels.triton import launch

    *layout, exact, tile = rest
    with _device_of(x):
        return launch.linear(x, Planes(*layout), bias, exact=exact, tile=tile)


def _signs_linear(x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    from compressor.kernels.triton import launch_signs

    *layout, exact, tile = rest
    with _device_of(x):
        return launch_signs.signs_linear(x, SparseSigns(*layout), bias, exact=exact, tile=tile)


def _planes_dense(words: Tensor, *rest: Any) -> Tensor:
    from compressor.kernels.triton import launch

    with _device_of(words):
        return launch.dense(Planes(words, *rest[:-1]), rest[-1])


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of ``x`` the current one, on which Triton launches."""
    other = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if other else nullcontext()


def _planes_fake(x: Tensor, bias: Tensor | None, words: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[1])


def _dense_fake(
    words: Tensor, scale: Tensor, zero: Tensor | None, offset: int, bits: int, run: int, group: int, n: int, *rest: Any
) -> Tensor:
    return words.new_empty(words.shape[1], n, dtype=rest[-1])


def _signs_fake(x: Tensor, bias: Tensor | None, words: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the layout, not x: the gradient needs the matrix only. Rounding of activations counts as the identity."""
    _, bias, *rest = inputs
    ctx.tensors = [isinstance(value, Tensor) for value in rest[:-2]]
    ctx.save_for_backward(*(value for value in rest[:-2] if isinstance(value, Tensor)))
    ctx.others = [value for value in rest[:-2] if not isinstance(value, Tensor)]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _layout(context: Any) -> list[Any]:
    tensors, others = iter(context.saved_tensors), iter(context.others)
    return [next(tensors if is_tensor else others) for is_tensor in context.tensors]


def _gradients(context: Any, grad: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    flat = grad.reshape(-1, grad.shape[-1])
    of_bias = None if context.bias_dtype is None else flat.sum(0).to(context.bias_dtype)
    of_x = (flat @ weight).view(*grad.shape[:-1], weight.shape[1])
    return of_x, of_bias, *[None] * (len(context.tensors) + 2)


def _planes_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operator: Any = torch.ops.compressor.triton_planes_dense  # gradients are traced too
    return _gradients(context, grad, operator(*_layout(context), grad.dtype))


def _signs_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(context, grad, SparseSigns(*_layout(context)).dense().to(grad.dtype))


for _name, _run, _fake in (
    (PLANES, _planes_linear, _planes_fake),
    (DENSE, _planes_dense, _dense_fake),
    (SIGNS, _signs_linear, _signs_fake),
):
    for _device in ("CUDA", "CPU"):  # on the CPU only by Triton's interpreter
        LIBRARY.impl(_name, _run, _device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"compressor::{_name}", _fake, lib=LIBRARY)
for _name, _backward in ((PLANES, _planes_backward), (SIGNS, _signs_backward)):
    torch.library.register_autograd(f"compressor::{_name}", _backward, setup_context=_save, lib=LIBRARY)


def linear(
    x: Tensor, bias: Tensor | None, layout: Planes | SparseSigns, *, exact: bool, tile: Sequence[int] = ()
) -> Tensor:
    """Return x W^T + bias, x (..., n), through the operator where something traces or differentiates it.

    Elsewhere the kernels are called directly, which costs less on the host.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling() or needs_grad:
        if isinstance(layout, Planes):
            operator: Any = torch.ops.compressor.triton_planes_linear
            return operator(x, bias, *planes_arguments(layout), exact, list(tile))  # type: ignore[no-any-return]
        operator = torch.ops.compressor.triton_signs_linear
        return operator(x, bias, *signs_arguments(layout), exact, list(tile))  # type: ignore[no-any-return]
    if isinstance(layout, Planes):
        return _planes_linear(x, bias, *planes_arguments(layout), exact, tile)
    return _signs_linear(x, bias, *signs_arguments(layout), exact, tile)
