"""What each stage of a recipe leaves behind, noted block by block while the blocks pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, prod
from statistics import median
from typing import Any

from compressor.engine.skeleton import Linear
from compressor.report.schema_chain import StageResult
from compressor.run.session import Run
from compressor.run.transform import BlockWork


def after_stage(work: BlockWork, chosen: Sequence[Linear]) -> dict[str, Any]:
    """The linears of a block as a stage leaves them, and the errors of those it was given."""
    rows = list(work.layers.values())
    errors = [work.layers[linear.name].get("relative_error") for linear in chosen]
    return {
        "matrices": len(chosen),
        "weights": sum(prod(row["shape"]) for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "zeros": fsum(row["sparsity"] * prod(row["shape"]) for row in rows),
        "errors": [error for error in errors if error is not None],
    }


def stage_labels(run: Run) -> list[str]:
    """The stages of the recipe in a few words, with the groups that are really stored."""
    specs = {name: spec for record in run.journal.blocks for name, spec in record.get("specs", {}).items()}
    labels = []
    for stage, linears in zip(run.recipe.stages, run.plan.targets, strict=True):
        own = [linear.name for linear in linears if stage.settings_of(linear.name) is stage.settings]
        labels.append(stage.label_of(specs[name] for name in own if name in specs))
    return labels


def stage_results(run: Run) -> list[StageResult]:
    """The stages of the recipe in order; none where blocks do not pass through stages, as in linearizing."""
    blocks = [record.get("stages", []) for record in run.journal.blocks]
    results, labels = [], stage_labels(run)
    for number, stage in enumerate(run.recipe.stages):
        notes = [notes[number] for notes in blocks if number < len(notes)]
        weights = sum(note["weights"] for note in notes)
        if not weights:
            continue
        count = sum(note["bytes"] for note in notes)
        errors = [] if stage.end_to_end else [error for note in notes for error in note["errors"]]
        results.append(
            StageResult(
                label=labels[number],
                matrices=sum(note["matrices"] for note in notes),
                bytes=count,
                bits_per_weight=8 * count / weights,
                sparsity=fsum(note["zeros"] for note in notes) / weights,
                relative_error=median(errors) if errors else None,
            )
        )
    return results
