"""Recall beyond the window: is a passage predicted better because it stood there before, many windows ago?

A text is  lead | A B | filler | A B.  The loss on the second B is held against the same text with another passage in
the first place. The lead is longer than the sinks, so that only a memory (or a layer that was kept) can bridge the
filler. It needs no special training data and no task: a model that copies at all shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.report.schema_linear import Recall, RecallRow, Who
from compressor.run.proof_models import logits_of, mixer_of, model_of, parts_of, window_of

Passage = Literal["random tokens", "natural text"]
KNOWN_COPYIST = 0.25
"""Random tokens that a teacher must name for them to be the test; small models copy names, but no random tokens."""

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Trials:
    """Texts (trials, L) that differ only in what stands where the passage stands first."""

    shown: Tensor
    hidden: Tensor


@torch.no_grad()
def recall(
    teacher: Any,
    student: Any,
    ids: Tensor,
    *,
    distances: Sequence[int] = (2, 4, 8, 16),
    passage: Passage | None = None,
    cue: int = 8,
    target: int = 16,
    trials: int = 8,
    seed: int = 0,
) -> Recall:
    """Measure the gain at some distances.

    Args:
        ids: (windows, T) int64 token ids, from which passages and fillers are taken.
        distances: from the first time to the second, in windows; those with no room for the passage are left out.
        passage: what is repeated. Random tokens cannot be guessed, so that all of the gain is recall; they are taken
            by default if the teacher can repeat them at the shortest distance, else a passage of the text.
        cue, target: tokens of A and of B.
        trials: texts at each distance.
    """
    window, spec = window_of(student), mixer_of(student)
    limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    whos: tuple[Who, ...] = ("teacher", "student", *(who for who in parts_of(student) if who == "window"))
    lead = (spec.sinks if spec is not None else 0) + 4
    distances = sorted(distance for distance in distances if distance * window >= cue + target)

    def texts_at(distance: int, kind: Passage) -> Trials:
        generator = torch.Generator().manual_seed(seed * 1000 + distance)
        return make_trials(ids, lead, cue + target, distance * window, kind, trials, generator)

    if passage is None and distances:
        named = _losses(teacher, texts_at(distances[0], "random tokens").shown, target)[1]
        passage = "random tokens" if named >= KNOWN_COPYIST else "natural text"
    kind = passage or "natural text"
    rows = []
    for distance in distances:
        texts = texts_at(distance, kind)
        for who in whos:
            with model_of(who, teacher, student) as model:
                loss, hits = _losses(model, texts.shown, target)
                without, guessed = _losses(model, texts.hidden, target)
            gains = without - loss
            rows.append(
                RecallRow(
                    distance=distance * window,
                    windows=distance,
                    beyond_context=limit is not None and texts.shown.shape[1] > limit,
                    who=who,
                    loss=float(loss.mean()),
                    gain=float(gains.mean()),
                    gain_stderr=float(gains.std() / math.sqrt(trials)) if trials > 1 else None,
                    hits=hits,
                    guessed=guessed,
                )
            )
    return Recall(passage=kind, cue=cue, target=target, trials=trials, rows=rows)


def make_trials(
    ids: Tensor, lead: int, length: int, distance: int, passage: Passage, trials: int, generator: torch.Generator
) -> Trials:
    """Make texts of ``lead`` + ``distance`` + ``length`` tokens.

    Fillers come from the first three quarters of the text, passages from the last, so that no filler holds a passage.
    """
    pool = ids.flatten()
    border = max(1, 3 * len(pool) // 4)

    def draw(low: int, high: int, count: int) -> Tensor:
        at = int(torch.randint(low, max(low + 1, high), (1,), generator=generator))
        return pool[low:high][(at - low + torch.arange(count)) % max(1, high - low)]

    def a_passage() -> Tensor:
        if passage == "natural text":
            return draw(border, len(pool), length)
        return pool[torch.randint(0, len(pool), (length,), generator=generator)]

    shown, hidden = [], []
    for trial in range(trials):
        start, repeated, other = ids[trial % len(ids), :lead], a_passage(), a_passage()
        filler = draw(0, border, distance - length)
        shown.append(torch.cat([start, repeated, filler, repeated]))
        hidden.append(torch.cat([start, other, filler, repeated]))
    return Trials(torch.stack(shown), torch.stack(hidden))


def _losses(model: Any, ids: Tensor, target: int) -> tuple[Tensor, float]:
    """Mean loss of the last ``target`` tokens of each text (trials,), and how many of all were the first choice."""
    losses, hits = [], 0
    at_once = max(1, TOKENS_AT_ONCE // ids.shape[1])
    for start in range(0, len(ids), at_once):
        rows = ids[start : start + at_once]
        logits = logits_of(model, rows, logits_to_keep=target + 1)[:, -target - 1 : -1].cpu()
        wanted = rows[:, -target:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        losses.append(loss.double().mean(1))
        hits += int((logits.argmax(-1) == wanted).sum())
    return torch.cat(losses), hits / (len(ids) * target)
