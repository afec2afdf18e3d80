"""The model card: the ``README.md`` of the output, for the hub and for whoever finds the folder."""

from __future__ import annotations

import re
from typing import Any

import yaml

from compressor.report.environment import environment, yaml_text
from compressor.report.linear_page import linear_page
from compressor.report.numbers import bytes_text
from compressor.report.schema import Report
from compressor.report.sentences import headline, what_was_done

INHERITED = ("license", "license_name", "license_link", "language")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
TOLD = ("weight", "samples", "documents", "sampling", "revision", "licence", "text_sha256")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
PLAIN = frozenset({"dense", "bfloat16", "float16", "float32", "float64"})
"""Formats that any runtime reads."""


def front_matter_of(card: str | None) -> dict[str, Any]:
    """The YAML at the head of a model card; empty when there is none or it cannot be read."""
    found = FRONT_MATTER.match((card or "").replace("\r\n", "\n"))
    if not found:
        return {}
    try:
        content = yaml.safe_load(found.group(1))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def model_card(report: Report, source_card: str | None = None) -> str:
    """Render the card.

    Args:
        source_card: text of the source model's card; licence and languages are inherited from it. Without one the card
            names no licence, because we do not know it.
    """
    inherited = front_matter_of(source_card)
    front: dict[str, Any] = {key: inherited[key] for key in INHERITED if key in inherited}
    if HUB_NAME.fullmatch(report.model.source):
        front["base_model"] = report.model.source
    front["library_name"] = "transformers"
    front["pipeline_tag"] = "text-generation"
    front["tags"] = _tags(report)
    linear = linear_page(report.linearization)
    packed = any(layer.format not in PLAIN for layer in report.layers)
    recipe = yaml_text(report.recipe)
    body = (
        environment()
        .get_template("card.md.j2")
        .render(
            report=report,
            headline=headline(report),
            done=what_was_done(report),
            packed=packed,
            own_code=packed or (report.linearization is not None and report.linearization.own_code),
            kind="linearized" if linear else "compressed" if packed else "pruned",
            linear=linear,
            licence=inherited.get("license"),
            recipe=recipe,
            fence=_fence(recipe),
            size_rows=_size_rows(report),
            sources=[_told(source) for source in report.calibration.sources] if report.calibration else [],
        )
    )
    return f"---\n{yaml_text(front)}---\n\n{body}"


def _tags(report: Report) -> list[str]:
    tags = ["compressor"]
    if any(layer.sparsity > 0 and layer.method != "kept" for layer in report.layers):
        tags += ["pruned", "sparse"]
    methods = {layer.method.split()[0] for layer in report.layers if layer.method != "kept" and layer.method.strip()}
    if report.linearization is not None:
        tags += ["linear-attention"]
        methods.add(report.linearization.method)
    return tags + sorted(method for method in methods if HUB_NAME.fullmatch(method))


def _size_rows(report: Report) -> list[tuple[str, str, str]]:
    size, model = report.size, report.model
    return [
        ("weight files", bytes_text(size.source_bytes), bytes_text(size.output_bytes)),
        ("bits per weight, linears", "", f"{size.bits_per_weight_linears:.2f}"),
        ("bits per weight, whole model", f"{size.source_bits_per_weight:.2f}", f"{size.bits_per_weight_model:.2f}"),
        ("parameters", f"{model.parameters:,}", f"{model.parameters:,}"),
    ]


def _told(source: dict[str, Any]) -> dict[str, Any]:
    """What a card says of a calibration source: where it lay on somebody's disk is nobody's business."""
    named = {"name": source.get("name") or source.get("spec"), **{key: source.get(key) for key in TOLD}}
    return {key: value for key, value in named.items() if value not in (None, "")}


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
