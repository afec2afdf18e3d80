"""What the page and the card show of a linearization, put together for the templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compressor.report.linear_words import (
    Check,
    beyond,
    checks,
    failed,
    has_window,
    memory_verdict,
    reach_words,
    recall_summary,
    recall_verdict,
)
from compressor.report.plot_linear import (
    CSS,
    WORDS,
    bucket_words,
    decode_panels,
    position_panels,
    recall_panels,
    training_panels,
)
from compressor.report.plots import Panel
from compressor.report.schema_linear import Linearization, Proof, RecallRow, Transfer


@dataclass(frozen=True)
class LayerLine:
    """A decoder block: what became of its attention, what choosing it scored, and how it was trained."""

    layer: int
    linear: bool
    score: float | None
    transfer: Transfer | None


@dataclass(frozen=True)
class RecallLine:
    """One distance: its rows in the order they are shown, and what they say."""

    rows: list[RecallRow]
    verdict: str


@dataclass(frozen=True)
class LinearPage:
    """All of it; lists are empty where nothing was measured."""

    linearization: Linearization
    verdict: str
    good: bool | None
    window: bool
    failed: list[str]
    layers: list[LayerLine]
    training: list[Panel]
    names: dict[str, str] = field(default_factory=lambda: {str(who): words for who, words in WORDS.items()})
    css: dict[str, str] = field(default_factory=lambda: {str(who): css for who, css in CSS.items()})
    beyond: Callable[..., float | None] = beyond
    checks: list[Check] = field(default_factory=list)
    positions: list[Panel] = field(default_factory=list)
    buckets: list[str] = field(default_factory=list)
    recall: list[Panel] = field(default_factory=list)
    recalled: list[RecallLine] = field(default_factory=list)
    recall_summary: str = ""
    decode: list[Panel] = field(default_factory=list)


def linear_page(linearization: Linearization | None) -> LinearPage | None:
    """Return what the templates show; None for a report without a linearization."""
    if linearization is None:
        return None
    verdict, good = memory_verdict(linearization)
    return LinearPage(
        linearization=linearization,
        verdict=" ".join([f"{verdict}.", reach_words(linearization)]).strip(),
        good=good,
        window=has_window(linearization),
        failed=failed(linearization),
        layers=layer_lines(linearization),
        training=training_panels(linearization.transfer, linearization.distillation),
        **_proved(linearization.proof, has_window(linearization)) if linearization.proof is not None else {},
    )


def layer_lines(linearization: Linearization) -> list[LayerLine]:
    """One line for each decoder block that is linearized or kept, in order."""
    linear = set(linearization.linearized)
    scores = {entry.layer: entry.score for entry in linearization.selection.scores} if linearization.selection else {}
    trained = {entry.layer: entry for entry in linearization.transfer}
    every = sorted(linear | set(linearization.kept) | scores.keys() | trained.keys())
    return [LayerLine(layer, layer in linear, scores.get(layer), trained.get(layer)) for layer in every]


def _proved(proof: Proof, window: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"checks": checks(proof, window=window)}
    if proof.positions is not None:
        shown |= {
            "positions": position_panels(proof.positions, window=window),
            "buckets": bucket_words(proof.positions),
        }
    if proof.recall is not None:
        recall = proof.recall
        distances = dict.fromkeys(row.distance for row in recall.rows)
        shown["recall"] = recall_panels(recall, window=window)
        shown["recall_summary"] = recall_summary(recall, window=window)
        shown["recalled"] = [
            RecallLine([row for row in recall.rows if row.distance == distance], recall_verdict(recall, distance))
            for distance in distances
        ]
    if proof.decode is not None:
        shown["decode"] = decode_panels(proof.decode)
    return shown
