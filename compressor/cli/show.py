"""Plans, results and evaluations as a person reads them in a terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from rich.text import Text

from compressor.cli.tables import add_row, new_table, print_facts, printable, say, wide_console
from compressor.cli.task_tables import print_foreseen_tasks, print_tasks
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
        "tasks": [asdict(task) for task in plan.tasks],
        "advice": linear_advice(plan.recipe.stages, skeleton),
        "notes": list(plan.notes),
        "violations": list(plan.violations),
    }


def print_plan(plan: Plan, model: str) -> None:
    """Print a plan."""
    facts = plan_json(plan, model)
    console = wide_console()
    scale = f"{facts['architecture']}, {facts['blocks']} blocks, {facts['parameters']:,} parameters"
    say(console, Text.assemble((printable(model), "bold"), f"  {scale}"))
    for number, (stage, linears) in enumerate(zip(plan.recipe.stages, plan.targets, strict=True), 1):
        settings = stage.settings.model_dump(exclude_defaults=True)
        shown = ", ".join(f"{key}={value}" for key, value in settings.items())
        say(
            console,
            Text.assemble((f"\nstage {number}: {stage.kind} {stage.name}", "bold"), f"  {shown}" if shown else ""),
        )
        if isinstance(stage.settings, LinearizeSettings):
            say(console, linear_words(stage.settings, facts["blocks"], plan.longer))
            continue
        table = new_table("", ("linears", "stored as"), ("count", "shape", "bits per weight"))
        groups = Counter((linear.kind, linear.shape, _spec_text(plan, linear.name)) for linear in linears)
        for (kind, shape, (form, bits)), count in groups.items():
            add_row(table, kind, form, str(count), f"{shape[0]} x {shape[1]}", bits)
        console.print(table)
    stored = f", {bytes_text(plan.logits_bytes)} of it the dense model's predictions" if plan.logits_bytes else ""
    told = {
        "output": f"{bytes_text(facts['output_bytes'])} (source {bytes_text(facts['source_bytes'])})",
        "bits per weight": f"{facts['bits_per_weight_model']:.3f} of the whole model",
        "memory, estimated": f"{bytes_text(facts['peak_memory_bytes'])} at the peak, "
        f"on {facts['device']} in {facts['dtype']}",
        "disk while running": bytes_text(facts["disk_bytes"]) + stored,
        "calibration": f"{facts['calibration_tokens']:,} tokens" if facts["calibration_tokens"] else "none needed",
        "loads with": "; ".join(facts["loads_with"]),
    }
    if plan.tasks:
        print_foreseen_tasks(console, plan.tasks)
    if facts["carried_over"]:
        told["carried over"] = f"{len(facts['carried_over'])} tensors the model does not know"
    print_facts(console, told)
    for line in facts["advice"]:
        say(console, f"also possible: {line}", "dim")
    for note in facts["notes"]:
        say(console, Text.assemble(("note:", "yellow"), f" {note}"))
    for violation in facts["violations"]:
        say(console, Text.assemble(("refused:", "red"), f" {violation}"))


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
    console = wide_console()
    say(console, headline(report), "bold")
    size = report.size
    say(
        console,
        f"{bytes_text(size.source_bytes)} → {bytes_text(size.output_bytes)}; "
        f"linears {size.bits_per_weight_linears:.3f}, whole model {size.bits_per_weight_model:.3f} bits per weight",
    )
    if classes := classes_told(report):
        say(console, classes)
    print_evaluation([entry.model_dump(mode="json") for entry in report.evaluation])
    if report.tasks:
        print_tasks(report.tasks)
    if kernels := kernels_told(report):
        say(console, kernels)
    if report.baseline:
        say(console, report.baseline.verdict)
    for kind, lines in (("warning", report.warnings), ("fallback", report.fallbacks)):
        for line in lines[:5]:
            say(console, Text.assemble((f"{kind}:", "yellow"), f" {printable(line)}"))
        if len(lines) > 5:
            say(console, Text.assemble((f"{kind}:", "yellow"), f" and {len(lines) - 5} more, see report.html"))
    if report.verification:
        say(console, f"a fresh process reproduced its logits ({report.verification.mode})")
    console.print(f"{output}  (read {output / 'report.html'})", soft_wrap=True)  # a path is copied whole


def print_evaluation(result: list[dict[str, Any]]) -> None:
    """Print evaluation rows as a table."""
    if not result:
        return
    heads = ("perplexity", "bits/byte", "KL", "top-1")
    rows = [
        (
            entry["name"],
            row["label"],
            significant(float(row["perplexity"])),
            significant(row["bits_per_byte"]) if row["bits_per_byte"] is not None else "",
            significant(row["kl"], 3) if row["kl"] is not None else "",
            percent(row["top1"]) if row["top1"] is not None else "",
        )
        for entry in result
        for row in entry["rows"]
    ]
    told = [column for column in range(len(heads)) if any(row[2 + column] for row in rows)]
    table = new_table("", ("text", "model"), tuple(heads[column] for column in told))
    for row in rows:
        add_row(table, *row[:2], *(row[2 + column] for column in told))
    console = wide_console()
    console.print(table)
    shown = {
        f"{entry['windows']} windows of {entry['protocol']['seqlen']} tokens, stride {entry['protocol']['stride']}, "
        f"BOS: {entry['protocol']['bos']}"
        for entry in result
    }
    say(console, "; ".join(sorted(shown)), "dim")
