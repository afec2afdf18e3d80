"""Perplexity by how much text stands before a token, of a linearized model, its parts and its teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compressor.report.schema_linear import PositionRow, Positions, Who
from compressor.run.proof_models import logits_of, model_of, parts_of, window_of

LOGITS_AT_ONCE = 1 << 24
"""Elements (windows x length x vocabulary) computed together."""


def position_edges(window: int, length: int) -> list[int]:
    """Return the largest context of each bucket: W, 2 W, 4 W, ..., and the longest there is, ``length`` - 1."""
    edges, edge, longest = [], window, length - 1
    while edge < longest:
        edges.append(edge)
        edge *= 2
    return [*edges, longest]


@torch.no_grad()
def positions(teacher: Any, student: Any, ids: Tensor, *, text: str = "") -> Positions:
    """Measure perplexity by position.

    The gain of the memory is the mean over all predictions with more than a window before them, of the loss without
    the memories less the loss with them; it is paired, so that its standard error over windows is small.

    Args:
        ids: (windows, T) int64 token ids, T >= 2.
        text: name of the text.
    """
    window = window_of(student)
    whos: tuple[Who, ...] = ("teacher", "student", *parts_of(student))
    losses: dict[Who, Tensor] = {}
    for who in whos:
        with model_of(who, teacher, student) as model:
            losses[who] = token_losses(model, ids)
    edges = position_edges(window, ids.shape[1])
    context = torch.arange(1, ids.shape[1])
    inside = [(context > low) & (context <= high) for low, high in zip([0, *edges], edges, strict=False)]
    gain, error = None, None
    if "window" in losses and len(edges) > 1:
        per_window = (losses["window"] - losses["student"])[:, context > window].mean(1)
        gain = float(per_window.mean())
        error = float(per_window.std() / math.sqrt(len(ids))) if len(ids) > 1 else None
    return Positions(
        text=text,
        windows=len(ids),
        window=window,
        edges=edges,
        tokens=[int(chosen.sum()) * len(ids) for chosen in inside],
        rows=[
            PositionRow(
                who=who,
                whole=_perplexity(losses[who]),
                perplexities=[_perplexity(losses[who][:, chosen]) for chosen in inside],
            )
            for who in whos
        ],
        gain=gain,
        gain_stderr=error,
    )


def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Return the negative log likelihood (windows, T - 1) of every token but the first, fp64 on the CPU."""
    at_once = max(1, LOGITS_AT_ONCE // (ids.shape[1] * model.config.get_text_config().vocab_size))
    out = []
    for start in range(0, len(ids), at_once):
        rows = ids[start : start + at_once]
        logits = logits_of(model, rows)[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), rows[:, 1:].to(logits.device), reduction="none"
        )
        out.append(loss.double().cpu())
    return torch.cat(out)


def _perplexity(losses: Tensor) -> float:
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf
