"""The verification table of a linearized model: everything that ``proof_*.py`` can prove, in one call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.report.schema_linear import Proof, Sample
from compressor.run.proof_exact import agreement, exactness
from compressor.run.proof_models import greedy, window_of
from compressor.run.proof_positions import positions
from compressor.run.proof_recall import Passage, recall
from compressor.run.proof_speed import decode


@dataclass(frozen=True)
class ProofSizes:
    """How much is measured.

    Attributes:
        texts: windows of the evaluation text for exactness; ``rows`` of them for agreement.
        steps: tokens that are decoded one by one, and generated, for agreement.
        windows: windows for perplexity by position; None: all.
        distances, passage, trials: of the recall (:func:`compressor.run.proof_recall.recall`); no distances: left out.
        contexts, decode_steps, decode_seconds: of the timing; no contexts: left out.
        sample_tokens: tokens of a sample; 0: no samples.
    """

    texts: int = 4
    rows: int = 2
    steps: int = 24
    windows: int | None = None
    distances: tuple[int, ...] = (2, 4, 8, 16)
    passage: Passage | None = None
    trials: int = 8
    contexts: tuple[int, ...] = (256, 1024, 4096)
    decode_steps: int = 16
    decode_seconds: float = 20.0
    sample_tokens: int = 40


def prove(
    teacher: Any,
    student: Any,
    ids: Tensor,
    *,
    tokenizer: Any = None,
    text: str = "",
    sizes: ProofSizes | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Proof:
    """Measure everything.

    Args:
        teacher, student: causal language models of transformers, in evaluation mode, on the device they shall run on.
        ids: (windows, T) int64 token ids of held-out text. T of several attention windows makes it
            meaningful: up to one window nothing can be said of the memory.
        tokenizer: for the samples; without one there are none.
        text: name of the text.
        say: told what comes next.
    """
    sizes = sizes or ProofSizes()
    began = time.perf_counter()
    left_out = []
    if ids.shape[1] <= window_of(student):
        left_out.append("the memory: no evaluated text is longer than the window")
    say("exactness")
    exact = exactness(teacher, student, ids, texts=sizes.texts)
    say("agreement of the ways to compute")
    agreed = agreement(student, ids, rows=sizes.rows, steps=sizes.steps)
    say("perplexity by position")
    placed = positions(teacher, student, ids[: sizes.windows], text=text)
    recalled, timed = None, None
    if sizes.distances:
        say("recall beyond the window")
        recalled = recall(teacher, student, ids, distances=sizes.distances, passage=sizes.passage, trials=sizes.trials)
    if sizes.contexts:
        say("time and memory of decoding")
        timed = decode(
            teacher,
            student,
            ids,
            contexts=sizes.contexts,
            steps=sizes.decode_steps,
            seconds=sizes.decode_seconds,
        )
    shown: list[Sample] = []
    if sizes.sample_tokens and tokenizer is not None:
        say("samples")
        prompts = [16, 2 * window_of(student)]
        shown = samples(teacher, student, tokenizer, ids, prompts=prompts, tokens=sizes.sample_tokens)
    for what, asked, wanted in (
        ("recall", recalled, sizes.distances),
        ("decoding", timed, sizes.contexts),
        ("samples", shown or None, sizes.sample_tokens),
    ):
        if asked is None:
            left_out.append(f"{what}: {'there is no tokenizer' if wanted else 'not asked for'}")
    return Proof(
        seconds=time.perf_counter() - began,
        exactness=exact,
        agreement=agreed,
        positions=placed,
        recall=recalled,
        decode=timed,
        samples=shown,
        left_out=left_out,
    )


@torch.no_grad()
def samples(
    teacher: Any, student: Any, tokenizer: Any, ids: Tensor, *, prompts: Sequence[int] = (16,), tokens: int = 40
) -> list[Sample]:
    """Let both models continue the beginnings of some texts greedily, through their caches.

    Args:
        ids: (windows, T) int64 token ids; sample r begins with the first ``prompts[r]`` tokens of window r.
        prompts: lengths of the beginnings; one beyond the window shows what the memory does.
        tokens: length of the continuations, less where a model ends its text.
    """
    out = []
    for row, length in enumerate(prompts):
        prompt = ids[row % len(ids), : min(length, ids.shape[1])][None]
        ours, theirs = (greedy(model, prompt, tokens, stop=True)[0].tolist() for model in (student, teacher))
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
        words = [tokenizer.decode(part, skip_special_tokens=True) for part in (prompt[0].tolist(), theirs, ours)]
        out.append(Sample(prompt=words[0], teacher=words[1], student=words[2], same=same))
    return out
