"""Plans, results and evaluations as a person reads them in a terminal."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.methods.linearize_settings import LinearizeSettings
from compressor.report.numbers import bytes_text, percent, significant
from compressor.report.schema import Report
from compressor.report.sentences import classes_told, headline, kernels_told
from compressor.run.container import LOADS_WITH
from compressor.run.linear_plan import linear_advice
from compressor.run.longer import Longer
from compressor.run.plan import Plan


def plan_json(plan: Plan, model: str) -> dict[str, Any]:
    """A plan as plain data."""
    skeleton = plan.skeleton
    return {
        "model": model,
        "architecture": type(skeleton.model).__name__,
        "blocks": len(skeleton.block_names),
        "parameters": skeleton.parameters(),
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "stages": [
            {
                "kind": stage.kind,
                "method": stage.name,
                "needs_data": stage.needs_data,
                "linears": len(linears),
                "weights": sum(prod(linear.shape) for linear in linears),
            }
            for stage, linears in zip(plan.recipe.stages, plan.targets, strict=True)
        ],
        "calibration_tokens": plan.recipe.calibration.nsamples * plan.seqlen if plan.recipe.needs_data else 0,
        "source_bytes": skeleton.checkpoint.disk_bytes,
        "output_bytes": plan.output_bytes,
        "bits_per_weight_model": 8 * plan.tensor_bytes / skeleton.parameters(),
        "peak_memory_bytes": plan.memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "logits_bytes": plan.logits_bytes,
        "loads_with": list(LOADS_WITH[plan.container]),
        "carried_over": list(skeleton.extra),
        "advice": linear_advice(plan.recipe.stages, skeleton),
        "violations": list(plan.violations),
    }


def print_plan(plan: Plan, model: str) -> None:
    """Print a plan."""
    facts = plan_json(plan, model)
    console = Console(highlight=False, markup=False)
    scale = f"{facts['architecture']}, {facts['blocks']} blocks, {facts['parameters']:,} parameters"
    console.print(Text.assemble((model, "bold"), f"  {scale}"))
    for number, (stage, linears) in enumerate(zip(plan.recipe.stages, plan.targets, strict=True), 1):
        settings = stage.settings.model_dump(exclude_defaults=True)
        shown = ", ".join(f"{key}={value}" for key, value in settings.items())
        console.print(Text.assemble((f"\nstage {number}: {stage.kind} {stage.name}", "bold"), f"  {shown}"))
        if isinstance(stage.settings, LinearizeSettings):
            console.print(linear_words(stage.settings, facts["blocks"], plan.longer))
            continue
        table = Table("linears", "count", "shape", "stored as", "bits per weight", box=None, header_style="dim")
        groups = Counter((linear.kind, linear.shape, _spec_text(plan, linear.name)) for linear in linears)
        for (kind, shape, (form, bits)), count in groups.items():
            table.add_row(kind, str(count), f"{shape[0]} x {shape[1]}", form, bits)
        console.print(table)
    table = Table(box=None, show_header=False)
    table.add_row("output", f"{bytes_text(facts['output_bytes'])} (source {bytes_text(facts['source_bytes'])})")
    table.add_row("bits per weight", f"{facts['bits_per_weight_model']:.3f} of the whole model")
    table.add_row(
        "memory, estimated",
        f"{bytes_text(facts['peak_memory_bytes'])} at the peak, on {facts['device']} in {facts['dtype']}",
    )
    stored = f", {bytes_text(plan.logits_bytes)} of it the dense model's predictions" if plan.logits_bytes else ""
    table.add_row("disk while running", bytes_text(facts["disk_bytes"]) + stored)
    table.add_row(
        "calibration", f"{facts['calibration_tokens']:,} tokens" if facts["calibration_tokens"] else "none needed"
    )
    table.add_row("loads with", "; ".join(facts["loads_with"]))
    if facts["carried_over"]:
        table.add_row("carried over", f"{len(facts['carried_over'])} tensors the model does not know")
    console.print()
    console.print(table)
    for line in facts["advice"]:
        console.print(f"also possible: {line}", style="dim")
    for violation in facts["violations"]:
        console.print(Text.assemble(("refused:", "red"), f" {violation}"))


def linear_words(settings: LinearizeSettings, blocks: int, longer: Longer | None = None) -> str:
    """What a linearizing stage will do, in a sentence."""
    from compressor.run.linear_plan import kept_count

    kept = kept_count(settings, blocks)
    how = "as given" if settings.keep_layers else f"chosen by {settings.select}"
    transfer, distillation = settings.stages
    end = f", {distillation:,} end to end ({settings.trained})" if distillation else ""
    if longer is not None:
        end += f", {longer.tokens:,} more in windows of {longer.seqlen:,}"
    stay = f"{kept} of {blocks} layers stay softmax attention, {how}" if kept else f"all {blocks} layers are linearized"
    return f"{stay}; {transfer:,} tokens of attention transfer for each layer{end}"


def _spec_text(plan: Plan, name: str) -> tuple[str, str]:
    from compressor.formats import nbytes

    if name not in plan.specs:
        return "dense", "-"
    spec = plan.specs[name]
    return spec["format"], f"{8 * nbytes(spec) / prod(spec['shape']):.3f}"


def print_result(report: Report, output: Path) -> None:
    """Print what a run has made."""
    console = Console(highlight=False, markup=False)
    console.print(headline(report), style="bold")
    size = report.size
    console.print(
        f"{bytes_text(size.source_bytes)} -> {bytes_text(size.output_bytes)}; "
        f"linears {size.bits_per_weight_linears:.3f}, whole model {size.bits_per_weight_model:.3f} bits per weight"
    )
    if classes := classes_told(report):
        console.print(classes)
    print_evaluation([entry.model_dump(mode="json") for entry in report.evaluation])
    if kernels := kernels_told(report):
        console.print(kernels)
    if report.baseline:
        console.print(report.baseline.verdict)
    for kind, lines in (("warning", report.warnings), ("fallback", report.fallbacks)):
        for line in lines[:5]:
            console.print(Text.assemble((f"{kind}:", "yellow"), f" {line}"))
        if len(lines) > 5:
            console.print(Text.assemble((f"{kind}:", "yellow"), f" and {len(lines) - 5} more, see report.html"))
    if report.verification:
        console.print(f"a fresh process reproduced its logits ({report.verification.mode})")
    console.print(f"{output}  (read {output / 'report.html'})")


def print_evaluation(result: list[dict[str, Any]]) -> None:
    """Print evaluation rows as a table."""
    if not result:
        return
    table = Table("text", "model", "perplexity", "bits/byte", "KL", "top-1", box=None, header_style="dim")
    for entry in result:
        for row in entry["rows"]:
            table.add_row(
                entry["name"],
                row["label"],
                significant(float(row["perplexity"])),
                significant(row["bits_per_byte"]) if row["bits_per_byte"] is not None else "",
                significant(row["kl"], 3) if row["kl"] is not None else "",
                percent(row["top1"]) if row["top1"] is not None else "",
            )
    console = Console(highlight=False, markup=False)
    console.print(table)
    shown = {
        f"{entry['windows']} windows of {entry['protocol']['seqlen']} tokens, stride {entry['protocol']['stride']}, "
        f"BOS: {entry['protocol']['bos']}"
        for entry in result
    }
    console.print("; ".join(sorted(shown)), style="dim")
