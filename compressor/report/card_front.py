"""The front matter of a model card: what the hub reads of it. Licence, languages and gating come from the source."""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml

from compressor.report.schema import Report

OURS = "compressor"
"""Tag of every card that compressor writes."""

INHERITED = ("license", "license_name", "license_link", "language")
GATING = "extra_gated_"
"""What the source asks of whoever wants it is asked of whoever wants what was made from it."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
TAG = re.compile(r"[\w.-]+", re.ASCII)
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)

Relation = Literal["quantized", "finetune"]


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


def front_matter(report: Report, inherited: dict[str, Any]) -> dict[str, Any]:
    """What stands at the head of the card.

    Args:
        inherited: that of the source's card. Without a licence there, none is named: we do not know it.
    """
    front: dict[str, Any] = {key: inherited[key] for key in INHERITED if key in inherited}
    front |= {key: value for key, value in inherited.items() if str(key).startswith(GATING)}
    if (base := base_model(report, inherited)) is not None:
        front["base_model"] = base
        if (kind := relation(report)) is not None:
            front["base_model_relation"] = kind
    if used := datasets(report):
        front["datasets"] = used
    front["library_name"] = "transformers"
    front["pipeline_tag"] = inherited.get("pipeline_tag", "text-generation")
    front["tags"] = tags(report, inherited)
    return front if report.exported is None else with_form(front, report.exported.library, report.exported.tag)


def with_form(front: dict[str, Any], library: str | None, tag: str | None) -> dict[str, Any]:
    """The same with what an export is: the library that loads it, and the hub's tag for its form; None: has none."""
    kept = {key: value for key, value in front.items() if key not in ("library_name", "tags")}
    named = {} if library is None else {"library_name": library}
    more = [] if tag is None or tag in front["tags"] else [tag]
    return {**kept, **named, "tags": [*front["tags"], *more]}


def base_model(report: Report, inherited: dict[str, Any]) -> Any:
    """The hub id of the model it was made from.

    Of a chain through local folders it is the model the chain began with, handed on from card to card. A folder that is
    not from the hub has none: its name says nothing there.
    """
    if HUB_ID.fullmatch(report.model.source):
        return report.model.source
    return inherited.get("base_model") if OURS in _listed(inherited.get("tags")) else None


def relation(report: Report) -> Relation | None:
    """How the hub calls what was done to the base model; None for what it has no word for (pruned, low-rank).

    Linearized models were trained; whatever was rounded to fewer bits is quantized, pruned or not.
    """
    if report.linearization is not None:
        return "finetune"
    stages = [(kind, content) for stage in report.recipe.get("stages", []) for kind, content in stage.items()]
    rounded = any(kind == "quantize" or (content or {}).get("bits") is not None for kind, content in stages)
    coarser = report.exported is not None and not report.exported.exact
    return "quantized" if rounded or coarser else None


def datasets(report: Report) -> list[str]:
    """Hub ids of the sets it was calibrated on."""
    sources = report.calibration.sources if report.calibration else []
    return sorted({str(source["hub"]) for source in sources if HUB_ID.fullmatch(str(source.get("hub") or ""))})


def tags(report: Report, inherited: dict[str, Any]) -> list[str]:
    """Tags: what kind of model it is, and the methods that made it so.

    What an earlier command of a chain has done is handed on from card to card.
    """
    found = [OURS]
    before = _listed(inherited.get("tags"))
    kinds = {kind for stage in report.recipe.get("stages", []) for kind in stage}
    if "prune" in kinds or (OURS in before and "pruned" in before):
        found += ["pruned", "sparse"]
    if "decompose" in kinds or (OURS in before and "low-rank" in before):
        found += ["low-rank"]
    methods = {layer.method.split()[0] for layer in report.layers if layer.method != "kept" and layer.method.strip()}
    if report.linearization is not None:
        methods.add(report.linearization.method)
    if report.linearization is not None or (OURS in before and "linear-attention" in before):
        found += ["linear-attention"]
    if any("compressed-tensors" in entry.name for entry in report.runtimes if entry.passed):
        found += ["compressed-tensors"]
    return found + sorted(method for method in methods if TAG.fullmatch(method))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
