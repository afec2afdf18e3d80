"""Learning positions of truncation as Dobi-SVD published it: with an SVD of every output in every step.

(arXiv 2502.02723, section 3.1. There as here the loss is the perplexity, and a penalty on the distance of the ratio of
parameters from the one asked for; Adam's rate is 5, falling to 4, for positions out of 2048. Positions here count
components of the matrix, where there they count tokens of a window and are scaled by a whole number that is zero for
small matrices. They begin at the share that is asked for. Nothing is held out: the last positions are the result.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from compressor.engine.backward import loss_backward
from compressor.engine.skeleton import Linear
from compressor.methods.gates import PUBLISHED_EDGE, Room, openness
from compressor.methods.ranks import Rank
from compressor.methods.stable_svd import stable_svd
from compressor.run.gates import WINDOW_TOKENS
from compressor.run.session import Run

PENALTY = 200.0
"""Weight of the distance between the ratio of parameters and the one asked for."""

RATES = 5 / 2048, 4 / 2048
"""Of Adam at the beginning and at the end, in shares of a matrix's components."""


def learn_as_published(run: Run, scratch: Path, linears: Sequence[Linear], room: Room, steps: int) -> list[Rank]:
    """Return ranks learned on the calibration text, within the budget of ``room``.

    Args:
        scratch: folder for hidden states.
        linears: matrices that are truncated.
        room: their prices and budget.
        steps: how many batches to learn from.
    """
    calibration = run.inputs.calibration
    assert calibration is not None  # checked by the survey
    ids = calibration.ids
    batch = max(1, WINDOW_TOKENS // ids.shape[1])
    counts = torch.tensor([float(price.count) for price in room.prices])
    each = torch.tensor([price.each for price in room.prices])
    whole = torch.tensor([price.whole for price in room.prices])
    target = room.budget / float(whole.sum())
    least = 1 / counts
    shares = (target * whole / each / counts).clamp(max=1).maximum(least).requires_grad_(True)
    optimizer = torch.optim.Adam([shares], lr=RATES[0])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=RATES[1])

    def position(i: int) -> Tensor:
        return shares[i] * counts[i]

    with run.voice.progress(steps) as ticker, truncating(run.skeleton.model, linears, position):
        for step in range(steps):
            ticker.now("learning positions of truncation as published")
            start = step * batch % max(1, len(ids) - batch + 1)
            optimizer.zero_grad()
            stream = run.runner.start(ids[start : start + batch])
            loss = loss_backward(run.runner, stream, scratch, weights=lambda block: {})
            if shares.grad is not None:  # of the sum over predicted tokens; wanted: of the perplexity
                shares.grad *= math.exp(min(loss, 50.0)) / (stream.ids.shape[0] * (stream.ids.shape[1] - 1))
            with torch.enable_grad():
                ratio = (shares * counts * each).sum() / whole.sum()
                (PENALTY * (ratio - target).abs()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                shares.copy_(shares.detach().clamp(max=1).maximum(least))
            ticker.advance()
    return room.ranks(room.project(shares.detach()))


@contextmanager
def truncating(model: Module, linears: Sequence[Linear], position: Callable[[int], Tensor]) -> Iterator[None]:
    """Truncate the outputs of ``linears``, whenever they are called, at ``position`` (index -> a scalar)."""

    def hook(i: int, count: int) -> Callable[[Any, Any, Tensor], Tensor]:
        def cut(module: Any, _: Any, out: Tensor) -> Tensor:
            bias = getattr(module, "bias", None)
            plain = out if bias is None else out - bias
            kept = truncated_outputs(plain.float(), position(i).to(out.device), count).to(out.dtype)
            return kept if bias is None else kept + bias

        return cut

    handles = [
        model.get_submodule(linear.name).register_forward_hook(hook(i, min(linear.shape)))
        for i, linear in enumerate(linears)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def truncated_outputs(y: Tensor, position: Tensor, count: int) -> Tensor:
    """Return ``y`` (..., T, m), outputs without bias, with the singular values of every window cut off softly.

    Args:
        position: scalar, in components; differentiable.
        count: components that the matrix has: more than that singular values are none of its.
    """
    U, s, V = stable_svd(y)
    kept = min(count, s.shape[-1])
    open_ = openness(position, count, PUBLISHED_EDGE)[:kept]
    result: Tensor = (U[..., :kept] * (s[..., :kept] * open_)[..., None, :]) @ V[..., :kept].mT
    return result
