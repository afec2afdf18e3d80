"""The memory by the kernels of flash-linear-attention, on GPUs where it is installed and gives what ours gives.

Its ``chunk_simple_gla`` (one decay a head) and ``chunk_gla`` (one a channel) compute S_t = g_t S_{t-1} + k_t v_t, o_t =
q_t S_t. That is our memory where it holds every token. Where it holds what has left a window of w tokens, the token of
w columns before enters at step t, already decayed to the present. The window, the sinks and the denominators stay
ours: a value's last channel is a one, so that the kernel returns numerator and denominator, whatever is done with
them. It knows as many key heads as query heads: keys are repeated.

The kernels multiply fp32 in TF32, so they are for models that compute in 16 bits anyway. They are compared with our
operation once for every size, gradients too: which of their versions are wrong on which GPU is a list that changes
(flash-linear-attention#640), and an installation whose kernels do not start shows there as well.

Signatures: fla-core 0.6.0. Not a dependency; only imported where all the rest allows it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.mixers.chunked import (
    Frame,
    Read,
    State,
    Tokens,
    all_ranks,
    empty_state,
    kept_decay,
    read_all,
    with_ones,
)

Kernel = Callable[..., tuple[Tensor, Tensor]]

FLA_VARIABLE = "COMPRESSOR_FLA"
"""Environment variable: ``auto``, or ``off`` for our own operation everywhere."""

FLA_FEWEST = 256
"""New tokens from which on a call is worth the kernels: fewer are a few of our chunks. Not measured."""

FLA_APART = {"outputs": 1e-2, "gradients": 5e-2}
"""How far kernels may be from ours, relative to the largest number. TF32 rounds to 5e-4; the gradients of decays are
small differences of large sums."""


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


def read_with(
    kernel: Kernel,
    tokens: Tokens,
    frame: Frame,
    state: State | None = None,
    *,
    scale: float = 1.0,
    sink_logits: Tensor | None = None,
) -> tuple[Read, State]:
    """:func:`read_all`, with the memory by ``kernel``: ``chunk_simple_gla``, or ``chunk_gla`` for a decay a channel."""
    state = empty_state(tokens, frame) if state is None else state
    late = max(0, frame.window - 1) if frame.older else 0  # tokens between a token and its entering
    decays = torch.cat([state["decays"], kept_decay(tokens)], 2)
    features = torch.cat([state["features"], tokens.key_features], 2)
    entering, values = _entering(tokens, frame, state, features, decays, late)
    if frame.older and frame.window:  # a token enters after the step's query has read: for a kernel, at the next step
        entered = pad(entering, (0, 0, 1, -1)) * kept_decay(tokens).exp()
        memory, last = _run(kernel, tokens, entered, pad(values, (0, 0, 1, -1)), state["memory"])
        # no product of matrices, which autocast would round to bf16
        last = last + entering[:, :, -1, :, None] * values[:, :, -1, None, :]
    else:
        memory, last = _run(kernel, tokens, entering, values, state["memory"])
    if frame.window:
        read, after = _window_alone(tokens, frame, state, scale, sink_logits)
        read = replace(read, memory=memory)
    else:
        read = Read(torch.zeros_like(memory), memory, torch.zeros_like(memory[..., :1]))
        after = {**state, "count": state["count"] + tokens.valid.sum(1)}
    cached = slice(max(0, features.shape[2] - late), None)
    return read, {**after, "memory": last, "features": features[:, :, cached], "decays": decays[:, :, cached]}


def _entering(
    tokens: Tokens, frame: Frame, state: State, features: Tensor, decays: Tensor, late: int
) -> tuple[Tensor, Tensor]:
    """What enters the memory at each new token, decayed to that token: features (B, Hk, T, f), values (B, Hk, T, dv+1).

    Zeros where nothing does: in the first window of a text, for padding, and for sinks, which stay in the softmax.
    """
    known, T = features.shape[2], tokens.keys.shape[2]
    count = max(0, known - late)
    values = torch.cat([state["values"], tokens.values], 2)[:, :, -known:][:, :, :count]
    first = frame.sinks if frame.older and frame.window else 0
    enters = (all_ranks(tokens, state)[:, -known:][:, :count] >= first)[:, None, :, None]
    entering = features[:, :, :count] * enters
    if late:
        since = decays.double().cumsum(2)  # sums over a whole text, of which small differences are taken
        entering = entering * (since[:, :, late : late + count] - since[:, :, :count]).exp().to(entering.dtype)
    return pad(entering, (0, 0, T - count, 0)), pad(with_ones(values), (0, 0, T - count, 0))


def _run(kernel: Kernel, tokens: Tokens, keys: Tensor, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return what queries read, (B, Hk, g, T, dv+1), and the memory behind the last token."""
    Hk, g = tokens.query_features.shape[1:3]
    dtype = tokens.values.dtype
    gates = kept_decay(tokens)

    def laid_out(x: Tensor) -> Tensor:  # (B, Hk, T, c) -> (B, T, Hk g, c)
        return x.to(dtype).repeat_interleave(g, 1).transpose(1, 2)

    found, last = kernel(
        q=tokens.query_features.to(dtype).flatten(1, 2).transpose(1, 2),
        k=laid_out(keys),
        v=laid_out(values),
        g=laid_out(gates) if gates.shape[-1] > 1 else laid_out(gates)[..., 0],
        scale=1.0,
        initial_state=memory.to(dtype).repeat_interleave(g, 1),
        output_final_state=True,
    )
    return found.transpose(1, 2).unflatten(1, (Hk, g)), last.unflatten(1, (Hk, g))[:, :, 0]


def _window_alone(
    tokens: Tokens, frame: Frame, state: State, scale: float, sink_logits: Tensor | None
) -> tuple[Read, State]:
    """Our operation over tokens without features, for what it reads and keeps of the window."""
    plain = replace(
        tokens,
        query_features=tokens.query_features[..., :0],
        key_features=tokens.key_features[..., :0],
        log_decay=tokens.log_decay[..., :1].detach(),
    )
    held = {
        **state,
        "memory": state["memory"][:, :, :0],
        "features": state["features"][..., :0],
        "decays": state["decays"][..., :1].detach(),
    }
    return read_all(plain, frame, held, chunk=max(64, frame.window), scale=scale, sink_logits=sink_logits)


log = logging.getLogger("compressor")


def kernel_for(tokens: Tokens) -> Kernel | None:
    """The kernel for tokens like these, here and now; None where ours is to be used.

    Raises:
        ValueError: the environment variable COMPRESSOR_FLA has another value than ``auto`` and ``off``.
    """
    value = os.environ.get(FLA_VARIABLE, "auto").strip().lower() or "auto"
    if value not in ("auto", "off"):
        raise ValueError(f"{FLA_VARIABLE}={value}: expected auto or off")
    (_, Hk, g, T, f), dv = tokens.query_features.shape, tokens.values.shape[-1]
    if value == "off" or not on_gpu(tokens.values) or torch.compiler.is_compiling():
        return None
    if not f or T < FLA_FEWEST or tokens.values.dtype != torch.float32:
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
        if not apart <= FLA_APART[what]:  # nor what is no number
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
