"""Which layers stay softmax attention: by what their linearization does to the model's predictions.

``kl-add`` restores one layer's softmax in the linearized model; ``kl-replace`` linearizes one layer of the dense one.
Either way every layer makes a candidate model, and candidates differ from a common one in a single block: they share
its states up to there, so that all of them are measured in one pass with one block in memory. (Adding to an all-linear
student chooses better than removing from the teacher, arXiv 2512.20569.)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.transfer import with_attention


@torch.no_grad()
def score_layers(runner: BlockRunner, ids: Tensor, student: Callable[[int], nn.Module], *, add: bool) -> list[float]:
    """Mean KL(dense || candidate), nats per token, of every layer's candidate.

    Args:
        ids: (windows, length) to measure on.
        student: makes the linearized attention of a loaded block.
        add: the candidate of layer i is linearized but for i; else it is dense but for i.
    """
    dense = runner.start(ids)
    common = dense.copy()
    candidates: list[Stream] = []
    for block in range(len(runner.skeleton.blocks)):
        module = runner.load_block(block)
        fork = common.copy()
        runner.step(block, dense)
        linear = student(block)
        if add:
            runner.step(block, fork)
            with with_attention(module, linear):
                for stream in [common, *candidates]:
                    runner.step(block, stream)
        else:
            with with_attention(module, linear):
                runner.step(block, fork)
            for stream in [common, *candidates]:
                runner.step(block, stream)
        candidates.append(fork)
        runner.release_block(block)
    return [divergence(runner, dense, candidate) for candidate in candidates]


def divergence(runner: BlockRunner, dense: Stream, other: Stream) -> float:
    """Mean KL(dense || other) over all tokens, nats."""
    total = 0.0
    for _, span in dense.batches():
        wanted = torch.log_softmax(runner.logits(dense, span), -1)
        given = torch.log_softmax(runner.logits(other, span), -1)
        total += float((wanted.exp() * (wanted - given)).sum())
    return total / dense.ids.numel()


def choose(rule: str, count: int, scores: list[float]) -> list[int]:
    """Return the ``count`` layers that stay softmax, in order. Ties go to the earlier layer.

    Args:
        rule: as in the settings; ``scores``: of every layer, KL or relative error.
    """
    layers = len(scores)
    if rule == "even":
        return sorted({round((i + 0.5) * layers / count - 0.5) for i in range(count)}) if count else []
    best_first = sorted(range(layers), key=lambda i: scores[i] if rule == "kl-add" else -scores[i])
    return sorted(best_first[:count])
