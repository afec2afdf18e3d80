"""Whether kernels of flash-linear-attention read a linearized layer's memory: on GPUs, where they give what ours gives.

They multiply fp32 in TF32, so they are for models that compute in 16 bits anyway. They are compared with our operation
once for every size, gradients too: which of their versions are wrong on which GPU is a list that changes
(flash-linear-attention#640), and an installation whose kernels do not start shows there as well.

Not a dependency; only imported where all the rest allows it, and by name, since transformers refuses a reader file
that imports what is not installed.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from compressor.mixers.chunked import Frame, Read, State, Tokens, read_all
from compressor.mixers.fla import Kernel, read_with

log = logging.getLogger("compressor")

FLA_VARIABLE = "COMPRESSOR_FLA"
"""Environment variable: ``auto``, or ``off`` for our own operation everywhere."""

FLA_FEWEST = 256
"""New tokens from which on a call is worth the kernels: fewer are a few of our chunks. Not measured."""

FLA_APART = 1e-2
"""How far kernels may be from ours, relative to the largest number. Rounding to TF32 makes 1e-4 to 7e-4 of it, in
outputs and gradients alike (the kernels in Triton's interpreter, their factors rounded so)."""


def read_tokens(
    tokens: Tokens,
    frame: Frame,
    state: State | None = None,
    *,
    chunk: int = 64,
    scale: float = 1.0,
    sink_logits: Tensor | None = None,
    coarse: bool = False,
) -> tuple[Read, State]:
    """Read window and memory for every new token by whichever way is open. Arguments as for :func:`read_all`.

    Args:
        coarse: whether the memory's products may be rounded as TF32 is.

    Raises:
        ValueError: the environment variable COMPRESSOR_FLA has another value than ``auto`` and ``off``.
    """
    kernel = kernel_for(tokens) if coarse else None
    if kernel is None:
        return read_all(tokens, frame, state, chunk=chunk, scale=scale, sink_logits=sink_logits)
    return read_with(kernel, tokens, frame, state, scale=scale, sink_logits=sink_logits)


def kernel_for(tokens: Tokens) -> Kernel | None:
    """The kernel for tokens like these, here and now; None where ours is to be used.

    Raises:
        ValueError: the environment variable COMPRESSOR_FLA has another value than ``auto`` and ``off``.
    """
    if torch.compiler.is_compiling():
        return None
    value = os.environ.get(FLA_VARIABLE, "auto").strip().lower() or "auto"
    if value not in ("auto", "off"):
        raise ValueError(f"{FLA_VARIABLE}={value}: expected auto or off")
    (_, Hk, g, T, f), dv = tokens.query_features.shape, tokens.values.shape[-1]
    if value == "off" or not on_gpu(tokens.values) or tokens.values.dtype != torch.float32:
        return None
    if not f or T < FLA_FEWEST:
        return None
    made = (tokens.query_features, tokens.key_features, tokens.values, tokens.log_decay)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in made)
    return proved_kernel(tokens.log_decay.shape[-1] > 1, (Hk, g, f, dv), learns, str(tokens.values.device))


def on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels could run on it."""
    return tensor.is_cuda


@cache
def proved_kernel(vector: bool, sizes: tuple[int, int, int, int], learns: bool, device: str) -> Kernel | None:
    """Import a kernel and compare it with our operation; None, said once, where that fails.

    Args:
        vector: a decay a channel.
        sizes: Hk, g, f, dv.
        learns: whether its gradients are compared too.
        device: on which.
    """
    if find_spec("fla") is None:
        return None
    module, name = ("fla.ops.gla", "chunk_gla") if vector else ("fla.ops.simple_gla", "chunk_simple_gla")
    what = f"flash-linear-attention: {name}, {sizes[2]} features, {'training' if learns else 'inference'}"
    try:
        kernel: Kernel = getattr(import_module(module), name)
        wrong = _disagreement(kernel, vector, sizes, learns, device)
    except Exception as error:  # compilers and drivers raise what they like
        log.warning("%s: not used, it fails (%s: %s)", what, type(error).__name__, str(error).split("\n")[0])
        return None
    if wrong:
        log.warning("%s: not used, %s", what, wrong)
        return None
    log.info("%s: used", what)
    return kernel


def _disagreement(kernel: Kernel, vector: bool, sizes: tuple[int, int, int, int], learns: bool, device: str) -> str:
    """How a kernel differs from our operation on some tokens behind a state; nothing if it does not."""
    frame, kind = Frame(16, 2, True, True), torch.device(device).type
    with torch.inference_mode(False), torch.set_grad_enabled(learns), torch.autocast(kind, enabled=False):
        tokens, leaves = _probe(vector, sizes, device)
        _, state = read_all(tokens.span(0, 20), frame, chunk=16)
        new = tokens.span(20, 180)
        found = [
            (read.memory, after["memory"])
            for read, after in (read_with(kernel, new, frame, state), read_all(new, frame, state, chunk=16))
        ]
        pairs = [("outputs", *pair) for pair in zip(*found, strict=True)]
        if learns:
            given = [torch.autograd.grad((x.sin().sum() + y.sin().sum()), leaves, retain_graph=True) for x, y in found]
            pairs += [("gradients", *pair) for pair in zip(*given, strict=True)]
    for what, theirs, ours in pairs:
        apart = float(((theirs - ours).abs().max() / ours.abs().max()).detach())
        if not apart <= FLA_APART:  # nor what is no number
            return f"its {what} are {apart:.1e} from ours"
    return ""


def _probe(vector: bool, sizes: tuple[int, int, int, int], device: str) -> tuple[Tokens, list[Tensor]]:
    """Random tokens (B = 1, T = 180), the global generator untouched, and those of their tensors that learn."""
    (Hk, g, f, dv), T, generator = sizes, 180, torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu").to(device)

    log_decay = -0.1 * drawn(1, Hk, T, f if vector else 1)
    leaves = [drawn(1, Hk, g, T, f) / f, drawn(1, Hk, T, f), drawn(1, Hk, T, dv) - 0.5, log_decay]
    for leaf in leaves:
        leaf.requires_grad_(torch.is_grad_enabled())
    plain = drawn(1, Hk, g, T, 1)
    valid = torch.ones(1, T, dtype=torch.bool, device=device)
    return Tokens(plain, plain[:, :, 0], leaves[2], valid, leaves[0], leaves[1], leaves[3]), leaves
