"""Learning positions of truncation on the calibration text, with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compressor.engine.backward import loss_backward
from compressor.engine.skeleton import Linear
from compressor.methods.gates import Room, openness
from compressor.methods.ranks import Rank
from compressor.methods.subspace import Components
from compressor.run.session import Run

WINDOW_TOKENS = 2048
"""About as many tokens a step learns from."""

JUDGED_TOKENS = 8192
"""As many of the last calibration tokens are not learned from, but judge what was learned."""

RATE = 0.01
"""Of Adam, in shares of a matrix's components."""

JUDGED_EVERY = 10


def learn_gates(
    run: Run,
    scratch: Path,
    linears: Sequence[Linear],
    components_of: Callable[[int], dict[str, Components]],
    ranks: Sequence[Rank],
    room: Room,
    steps: int,
) -> list[Rank]:
    """Return ranks that make the loss on the calibration text small; never worse than ``ranks`` on windows held out.

    Args:
        linears: matrices that are truncated.
        components_of: block -> components of its matrices, by linear name.
        ranks: where to begin.
        room: their prices and budget.
        steps: how many batches to learn from.
    """
    calibration = run.inputs.calibration
    assert calibration is not None  # checked by the survey
    ids = calibration.ids
    held = max(1, min(JUDGED_TOKENS // ids.shape[1], len(ids) // 4))
    judged, learned = ids[-held:], ids[:-held] if len(ids) > held else ids
    batch = max(1, WINDOW_TOKENS // ids.shape[1])
    shares = torch.tensor([(rank or 0) / price.count for rank, price in zip(ranks, room.prices, strict=True)])
    shares = room.project(shares).requires_grad_(True)
    optimizer = torch.optim.Adam([shares], lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    places = {linear.name: i for i, linear in enumerate(linears)}

    def weights(block: int, opened: Callable[[int, Components], Tensor]) -> dict[str, Tensor]:
        parts = components_of(block)
        found = {}
        for linear in linears:
            if linear.block == block:
                part = parts[linear.name]
                weight = (part.left * opened(places[linear.name], part)) @ part.right
                weight = weight.to(run.runner.device, run.runner.dtype)
                found[f"{linear.name}.weight"] = weight.T if linear.transposed else weight
        return found

    def judge(kept: Sequence[Rank]) -> float:
        def cut(i: int, part: Components) -> Tensor:
            return (torch.arange(len(part.values)) < (kept[i] or len(part.values))).float()

        return loss_only(run, judged, lambda block: weights(block, cut))

    best, least = list(ranks), judge(ranks)
    with run.voice.progress(steps) as ticker:
        for step in range(1, steps + 1):
            ticker.now("learning positions of truncation")
            start = (step - 1) * batch % max(1, len(learned) - batch + 1)
            optimizer.zero_grad()
            stream = run.runner.start(learned[start : start + batch])
            loss_backward(
                run.runner,
                stream,
                scratch,
                weights=lambda block: weights(
                    block, lambda i, part: openness(shares[i] * room.prices[i].count, len(part.values))
                ),
            )
            assert shares.grad is not None
            shares.grad /= stream.ids.numel()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                shares.copy_(room.project(shares.detach()))
            if step % JUDGED_EVERY == 0 or step == steps:
                found = room.ranks(shares.detach())
                if (loss := judge(found)) < least:
                    best, least = found, loss
            ticker.advance()
    return best


@torch.no_grad()
def loss_only(run: Run, ids: Tensor, weights: Callable[[int], dict[str, Tensor]]) -> float:
    """Mean loss of token windows, in nats, with some of the weights replaced."""
    runner = run.runner
    stream = runner.start(ids)
    for block in range(run.blocks):
        runner.load_block(block)
        own = weights(block)
        for number, span in stream.batches():
            stream.states[span] = runner.forward_with(block, stream, number, span, own).cpu()
        runner.release_block(block)
    total = 0.0
    for _, span in stream.batches():
        logits = runner.logits(stream, span)[:, :-1].flatten(0, 1)
        wanted = stream.ids[span, 1:].flatten().to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))
