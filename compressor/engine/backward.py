"""The gradient of a model's loss with one block in memory at a time.

Forwards, the states that enter every block are put on disk; backwards, every block is run once more on them, with
gradients, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import Linear
from compressor.methods.statistics import all_finite
from compressor.methods.threads import one_thread

Objective = Callable[[Tensor, slice], tuple[Tensor, int]]
"""Logits (windows, length, vocabulary) fp32 of a batch, and which windows these are -> loss, summed, and over how many
tokens."""

Weights = Callable[[int], dict[str, Tensor]]
"""Block -> module tensor name -> value that stands for it, in the compute dtype; called with the block loaded."""


def loss_backward(
    runner: BlockRunner,
    stream: Stream,
    scratch: Path,
    *,
    weights: Weights,
    sampled: torch.Generator | None = None,
    objective: Objective | None = None,
    around: Callable[[int], Any] | None = None,
) -> float:
    """Run the loss of token windows backwards through all blocks; return it, the mean over tokens, in nats.

    On CPUs in one thread, for the same bits on any number.

    Args:
        stream: at the first block; it is at the last one afterwards.
        scratch: folder for the states; emptied afterwards.
        weights: what the blocks are run with; tensors that depend on leaves get their gradients there, those of the sum
            over tokens.
        sampled: draws the tokens that are to be predicted from the model itself, as the Fisher information wants it;
            None: those that follow in the windows.
        objective: another loss in place of that of these tokens.
        around: block -> context in which it is run with gradients.
    """
    blocks, learned = range(len(runner.skeleton.blocks)), False
    steady = one_thread() if runner.device.type == "cpu" else nullcontext()
    with steady, torch.no_grad():
        for block in blocks:
            runner.load_block(block)
            save_file({"states": stream.states}, _file(scratch, block))
            with torch.enable_grad():
                own = weights(block)
            learned = learned or any(tensor.requires_grad for tensor in own.values())
            for number, span in stream.batches():
                stream.states[span] = runner.forward_with(block, stream, number, span, own).cpu()
            runner.release_block(block)
        loss, gradients = _head(runner, stream, objective or _of_tokens(runner, stream, sampled))
        for block in reversed(blocks):
            runner.load_block(block)
            states = load_file(_file(scratch, block))["states"]
            own = weights(block)
            with around(block) if around is not None else nullcontext():
                for number, span in stream.batches():
                    call = stream.calls[number][block]
                    with torch.enable_grad():
                        hidden = states[span].to(runner.device).requires_grad_(True)
                        # what depends on leaves is made anew, since a graph serves one backward pass
                        out = runner.apply(block, call, hidden, weights(block) if learned else own)
                    out.backward(gradients[span].to(runner.device))  # type: ignore[no-untyped-call]
                    assert hidden.grad is not None
                    gradients[span] = hidden.grad.cpu()
            runner.release_block(block)
            _file(scratch, block).unlink()
    return loss


def _file(scratch: Path, block: int) -> Path:
    return scratch / f"entering-{block:05d}.safetensors"


def _of_tokens(runner: BlockRunner, stream: Stream, sampled: torch.Generator | None) -> Objective:
    """The loss of predicting the next tokens."""

    def objective(logits: Tensor, span: slice) -> tuple[Tensor, int]:
        logits = logits[:, :-1].flatten(0, 1)
        wanted = stream.ids[span, 1:].flatten().to(runner.device)
        if sampled is not None:
            chances = logits.detach().softmax(-1).cpu()
            wanted = torch.multinomial(chances, 1, generator=sampled)[:, 0].to(runner.device)
        return F.cross_entropy(logits, wanted, reduction="sum"), len(wanted)

    return objective


def _head(runner: BlockRunner, stream: Stream, objective: Objective) -> tuple[float, Tensor]:
    """Mean loss, and the gradient of its sum with respect to the states behind the last block."""
    gradients, total, tokens = torch.empty_like(stream.states), 0.0, 0
    for _, span in stream.batches():
        with torch.enable_grad():
            hidden = stream.states[span].to(runner.device).requires_grad_(True)
            loss, counted = objective(runner.head(stream.ids[span], hidden), span)
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        gradients[span] = hidden.grad.cpu()
        total += float(loss.detach())
        tokens += counted
    return total / tokens, gradients


@contextmanager
def seen_linears(
    runner: BlockRunner, linears: list[Linear], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, x, g)`` for every call of a linear whose output got a gradient.

    x (tokens, n) is its input, g (tokens, m) the gradient of its output; rows that are not finite are left out.
    """

    def hook(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def forward(_: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)

            def backward(gradient: Tensor) -> None:
                g = gradient.detach().flatten(0, -2)
                if all_finite(x) and all_finite(g):
                    see(name, x, g)
                else:
                    sound = torch.isfinite(x).all(1) & torch.isfinite(g).all(1)
                    see(name, x[sound], g[sound])

            if out.requires_grad:
                out.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    handles = [
        runner.skeleton.model.get_submodule(linear.name).register_forward_hook(hook(linear.name)) for linear in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
