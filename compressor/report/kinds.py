"""Layers summarized by kind, over the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from compressor.report.schema import Layer


@dataclass(frozen=True)
class Kind:
    """Summary of all layers of one kind, over the blocks."""

    name: str
    count: int
    sparsity: float
    bits_per_weight: float
    median_error: float | None
    worst: Layer | None


def kinds(layers: list[Layer]) -> list[Kind]:
    """One summary for each kind, in order of appearance. Sparsity and bits are weighted by parameters."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    summaries = []
    for name, members in groups.items():
        weights = sum(layer.shape[0] * layer.shape[1] for layer in members) or 1
        errors = [layer for layer in members if layer.relative_error is not None]
        summaries.append(
            Kind(
                name=name,
                count=len(members),
                sparsity=sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in members) / weights,
                bits_per_weight=sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in members)
                / weights,
                median_error=median(layer.relative_error or 0.0 for layer in errors) if errors else None,
                worst=max(errors, key=lambda layer: layer.relative_error or 0.0) if errors else None,
            )
        )
    return summaries
