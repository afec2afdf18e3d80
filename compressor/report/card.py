"""The model card: the ``README.md`` of the output, for the hub and for whoever finds the folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from compressor.report.card_front import front_matter, front_matter_of
from compressor.report.environment import environment, yaml_text
from compressor.report.footprint import footprint, has_products, stored_parameters
from compressor.report.linear_page import linear_page
from compressor.report.numbers import bytes_text
from compressor.report.schema import Report
from compressor.report.schema_use import Exported
from compressor.report.sentences import headline, what_was_done

TOLD = ("weight", "samples", "documents", "sampling", "revision", "licence", "text_sha256")
PLAIN = frozenset({"dense", "bfloat16", "float16", "float32", "float64"})
"""Formats that any runtime reads."""

WEIGHTS = (".safetensors", ".gguf")


def model_card(report: Report, source_card: str | None = None) -> str:
    """Render the card, of an export or of what a run wrote.

    Args:
        source_card: text of the card of the model, or folder, it was made from; licence, languages and gating are
            inherited from it. Without one the card names no licence, because we do not know it.
    """
    inherited = front_matter_of(source_card)
    shared = _shared(report, inherited)
    body = _body(report, shared) if report.exported is None else _export_body(report.exported, shared)
    return f"---\n{yaml_text(front_matter(report, inherited))}---\n\n{body}"


def files_told(names: Sequence[str]) -> str:
    """Weight files in a few words, in Markdown."""
    return f"`{names[0]}`" if len(names) == 1 else f"{len(names)} weight files"


def _body(report: Report, shared: dict[str, Any]) -> str:
    linear = shared["linear"]
    packed = any(layer.format not in PLAIN for layer in report.layers)
    return (
        environment()
        .get_template("card.md.j2")
        .render(
            **shared,
            packed=packed,
            own_code=(packed and not _integers(report)) or (linear is not None and linear.linearization.own_code),
            kind="linearized" if linear else "compressed" if packed else "pruned",
            size_rows=_size_rows(report),
        )
    )


def _export_body(exported: Exported, shared: dict[str, Any]) -> str:
    weights = [name for name in exported.files if name.endswith(WEIGHTS)]
    return (
        environment().get_template("card_export.md.j2").render(**shared, exported=exported, files=files_told(weights))
    )


def _shared(report: Report, inherited: dict[str, Any]) -> dict[str, Any]:
    """What both kinds of card say."""
    recipe = yaml_text(report.recipe)
    return {
        "report": report,
        "headline": headline(report),
        "left": footprint(report),
        "source_parameters": stored_parameters(report)[0],
        "products": has_products(report),
        "done": what_was_done(report),
        "linear": linear_page(report.linearization),
        "licence": inherited.get("license"),
        "ways": [entry for entry in report.runtimes if entry.passed],
        "recipe": recipe,
        "fence": _fence(recipe),
        "sources": [_told(source) for source in report.calibration.sources] if report.calibration else [],
    }


def _integers(report: Report) -> bool:
    """Whether the matrices are packed as compressed-tensors defines it, which stock transformers reads."""
    routes = [report.verification.route if report.verification else "", *(entry.name for entry in report.runtimes)]
    return any("compressed-tensors" in route for route in routes)


def _size_rows(report: Report) -> list[tuple[str, str, str]]:
    size = report.size
    before, after = stored_parameters(report)
    return [
        ("weight files", bytes_text(size.source_bytes), bytes_text(size.output_bytes)),
        ("bits per weight, linears", "", f"{size.bits_per_weight_linears:.2f}"),
        ("bits per weight, whole model", f"{size.source_bits_per_weight:.2f}", f"{size.bits_per_weight_model:.2f}"),
        ("parameters", f"{before:,}", f"{after:,}"),
    ]


def _told(source: dict[str, Any]) -> dict[str, Any]:
    """What a card says of a calibration source: where it lay on somebody's disk is nobody's business."""
    named = {"name": source.get("name") or source.get("spec"), **{key: source.get(key) for key in TOLD}}
    return {key: value for key, value in named.items() if value not in (None, "")}


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
