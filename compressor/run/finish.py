"""The report of a run, from what the run has noted."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from math import fsum, prod
from pathlib import Path
from typing import Any

import psutil
import torch

import compressor
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.hub_names import commit_of, parse_name
from compressor.engine.limits import peak_device_memory, peak_memory
from compressor.engine.observe import Observation
from compressor.engine.output import container_bytes
from compressor.engine.skeleton import Linear
from compressor.engine.tensorfile import Layout
from compressor.report.contents import read_contents
from compressor.report.files import write_report
from compressor.report.schema import (
    LINEARS,
    Baseline,
    Calibration,
    Evaluation,
    EvaluationRow,
    Expert,
    Layer,
    Memory,
    Model,
    Report,
    Resumed,
    Size,
    Timing,
    Tool,
    Verification,
)
from compressor.report.schema_use import Runtime
from compressor.report.sentences import judge
from compressor.run import measure
from compressor.run.history import history_of
from compressor.run.loaded import doubts
from compressor.run.plan import predict_layouts
from compressor.run.session import Run
from compressor.run.stage_results import stage_labels, stage_results

ORDER = ("dense", "compressed", "baseline")


def utc_now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def expert_tokens(linears: Sequence[Linear], seen: Observation) -> list[dict[str, Any]]:
    """Calibration tokens that reached each expert."""
    rows = []
    for linear in linears:
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.down_proj", linear.name):
            tokens = seen.statistics[linear.name].tokens
            rows.append({"module": match[1], "expert": int(match[2]), "tokens": tokens})
    return rows


def evaluate(run: Run) -> list[Evaluation]:
    """Measure every stream that has passed the blocks."""
    texts = run.inputs.texts
    if texts is None:
        return []
    labels = {
        "dense": "dense",
        "compressed": " + ".join(stage_labels(run)),
        "baseline": baseline_label(run),
    }
    return evaluations(
        {who: (labels[who], run.outer(who), run.streams[who]) for who in ORDER if who in run.streams}, run
    )


def evaluations(models: dict[str, tuple[str, BlockRunner, Stream]], run: Run) -> list[Evaluation]:
    """Measure models whose streams of the evaluation windows have passed the blocks.

    Args:
        models: role -> (label, runner, stream).
    """
    texts = run.inputs.texts
    assert texts is not None
    rows = measure.measure(models, texts, "dense")
    out = []
    for text, measured in zip(texts.texts, rows, strict=True):
        known, reason = measure.in_domain(run.inputs.calibration, text)
        out.append(
            Evaluation(
                name=text.name,
                protocol=measure.protocol(text, run.plan.dtype),
                windows=len(text.ids),
                tokens=text.ids.numel() - len(text.ids),
                in_domain=known,
                in_domain_reason=reason,
                text_sha256=text.text_sha256,
                tokens_sha256=text.sha256,
                rows=[EvaluationRow(**row) for row in measured],
            )
        )
    return out


def _baseline_facts(run: Run) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    for record in run.journal.blocks:
        facts |= record["baseline"] or {}
    return facts


def baseline_label(run: Run) -> str:
    """The baseline in words, from the grids it really used."""
    rounded = [fact for fact in _baseline_facts(run).values() if fact["bits"] <= 8]
    if not rounded:
        return "nothing to round"
    bits = sorted({fact["bits"] for fact in rounded})
    groups = sorted({fact["group"] for fact in rounded}, key=lambda group: group or 1 << 30)
    grid = "-".join(str(b) for b in (bits if len(bits) == 1 else [bits[0], bits[-1]]))
    size = "/".join("row" if group is None else str(group) for group in groups)
    larger = [fact["over"] for fact in rounded]
    where = "" if all(larger) else "in places "
    over = f" ({where}larger than the result: fewer bits do not exist)" if any(larger) else ""
    return f"{grid}-bit round-to-nearest, group {size}{over}"


def make_report(
    run: Run,
    specs: dict[str, dict[str, Any]],
    evaluation: list[Evaluation],
    verification: Verification | None,
    started: str,
    warnings: list[str],
    layouts: list[Layout] | None = None,
    runtimes: Sequence[Runtime] = (),
) -> Report:
    """Put together everything but the total time.

    Args:
        runtimes: in which the verification has loaded the folder.
        layouts: of the shards that were written, where the recipe and ``specs`` do not say it.
    """
    skeleton, recipe = run.skeleton, run.recipe
    layers = _layers(run)
    experts = [Expert(**row) for record in run.journal.blocks for row in record["experts"]]
    fallbacks = {layer.name: layer.fallback for layer in layers if layer.fallback}
    for expert in experts:
        expert.fallback = next(
            (why for name, why in fallbacks.items() if name.startswith(f"{expert.module}.{expert.expert}.")), None
        )
    size = _size(run, layouts or predict_layouts(skeleton, recipe, specs, run.plan.narrowing), layers)
    baseline = _baseline(run, evaluation, size, layers)
    text_config = skeleton.config.get_text_config()
    history, unknown = history_of(skeleton.checkpoint)
    return Report(
        tool=Tool(version=compressor.__version__, command=run.options.command, started=started, seconds=0.0),
        model=Model(
            **_source(run),
            model_type=skeleton.config.model_type,
            architecture=type(skeleton.model).__name__,
            blocks=run.blocks,
            sha256=run.journal.fingerprint["input"],
            parameters=skeleton.parameters(),
            linear_parameters=sum(prod(linear.shape) for linear in skeleton.linears),
            dtype=str(skeleton.linears[0].dtype).removeprefix("torch."),
            tied_embeddings=bool(skeleton.tied),
            vocabulary=text_config.vocab_size,
        ),
        recipe=recipe.resolved(),
        calibration=_calibration(run),
        size=size,
        layers=layers,
        evaluation=evaluation,
        baseline=baseline,
        verification=verification,
        stages=stage_results(run),
        history=history,
        runtimes=list(runtimes),
        timings=[Timing(what=what, seconds=seconds) for what, seconds in run.seconds.items()],
        memory=Memory(
            peak_rss_bytes=peak_memory(),
            peak_device_bytes=peak_device_memory(run.plan.device),
            predicted_bytes=run.plan.memory_bytes,
        ),
        versions=versions(),
        machine=machine(),
        seeds={"calibration": recipe.calibration.seed},
        threads=torch.get_num_threads(),
        resumed=_resumed(run),
        experts=experts,
        carried_over=list(skeleton.extra),
        warnings=warnings + unknown + _warnings(evaluation, skeleton.extra) + doubts(runtimes),
        fallbacks=[f"{name}: {why}" for name, why in fallbacks.items()]
        + [f"{layer.name}: factorization needed {', '.join(layer.rungs)}" for layer in layers if layer.rungs],
    )


def _source(run: Run) -> dict[str, Any]:
    """The name of the model it was made from; for one from the hub also its commit."""
    if Path(run.source).expanduser().exists():
        return {"source": Path(run.source).expanduser().resolve().name}
    if (model := parse_name(run.source, run.options.revision)) is None:
        return {"source": run.source}
    return {"source": model.id, "revision": commit_of(run.skeleton.checkpoint.folder) or model.revision}


def _layers(run: Run) -> list[Layer]:
    """The rows noted block by block; where the output is dense, with the bytes that its matrices have there."""
    rows = [row for record in run.journal.blocks for row in record["layers"]]
    if run.recipe.save == "dense" and run.plan.narrowing is None:
        stored = {linear.name: linear.dtype for linear in run.skeleton.linears}
        rows = [
            row
            | {
                "format": str(stored[row["name"]]).removeprefix("torch."),
                "bits_per_weight": 8.0 * stored[row["name"]].itemsize,
                "bytes": prod(row["shape"]) * stored[row["name"]].itemsize,
            }
            for row in rows
        ]
    return [Layer(**row) for row in rows]


def _warnings(evaluation: list[Evaluation], extra: Sequence[str]) -> list[str]:
    found = [
        f"text {text.name!r} was calibrated on as well ({text.in_domain_reason}): its perplexity flatters the result"
        for text in evaluation
        if text.in_domain
    ]
    if not evaluation:
        found.append("nothing was evaluated: the quality of this model is unknown")
    if extra:
        found.append(f"{len(extra)} tensors that the model does not use were carried over unchanged")
    return found


def _size(run: Run, layouts: list[Layout], layers: list[Layer]) -> Size:
    """The ledger measured from the written folder, beside the bytes accounted from the manifest.

    Raises:
        RuntimeError: the two differ by more than a percent, which would be a lie in the report.
    """
    skeleton, folder = run.skeleton, run.folder
    tensors = sum(prod(shape) * dtype.itemsize for layout in layouts for dtype, shape in layout.values())
    accounted = tensors + container_bytes(layouts)
    contents = read_contents(folder, carried_over=skeleton.extra)
    if abs(contents.weight_bytes - accounted) > 0.01 * accounted:
        raise RuntimeError(f"the weight files have {contents.weight_bytes} bytes, {accounted} were accounted for")
    linear_parameters = sum(prod(layer.shape) for layer in layers)
    parameters = skeleton.parameters()
    # those written: a linearized model has other matrices than the source's, which `layers` are
    linear_bytes = sum(item.bytes for item in contents.items if item.group in LINEARS)
    source = skeleton.checkpoint
    before = read_contents(source.folder)
    return Size(
        source_bytes=source.disk_bytes,
        output_bytes=accounted,
        weights_bytes=tensors,
        disk_bytes=contents.disk_bytes,
        bits_per_weight_linears=8 * linear_bytes / linear_parameters,
        bits_per_weight_model=8 * tensors / parameters,
        source_bits_per_weight=8 * source.nbytes / parameters,
        source_stored_parameters=before.stored_parameters,
        ledger=contents.ledger(before),
        kv_bytes_per_token=None if run.plan.narrowing is None else run.plan.narrowing.cache,
        source_kv_bytes_per_token=None if run.plan.narrowing is None else run.plan.narrowing.cache_before,
    )


def _baseline(run: Run, evaluation: list[Evaluation], size: Size, layers: list[Layer]) -> Baseline | None:
    facts = _baseline_facts(run)
    if not evaluation or not any(fact["bits"] <= 8 for fact in facts.values()):
        return None
    total = sum(fact["bytes"] for fact in facts.values())
    ours = sum(layer.bytes for layer in layers)
    weights = fsum(prod(linear.shape) for linear in run.skeleton.linears)
    return judge(
        evaluation,
        label=baseline_label(run),
        bits_per_weight=8 * total / weights,
        bytes=size.output_bytes - ours + total,
        compressed_bytes=size.output_bytes,
    )


def _calibration(run: Run) -> Calibration | None:
    windows = run.inputs.calibration
    if windows is None:
        return None
    return Calibration(
        sources=[_shown(source) for source in windows.sources],
        nsamples=len(windows.ids),
        seqlen=windows.ids.shape[1],
        seed=run.recipe.calibration.seed,
        tokens=windows.ids.numel(),
        sha256=windows.sha256,
    )


def _shown(source: dict[str, Any]) -> dict[str, Any]:
    """Facts of a calibration source with local files named without their folder: a report is made to be shown."""
    path = source.get("path")
    if not isinstance(path, str) or not Path(path).is_absolute():
        return source
    folder = str(Path(path).parent) + os.sep
    return {key: value.replace(folder, "") if isinstance(value, str) else value for key, value in source.items()}


def _resumed(run: Run) -> Resumed | None:
    times = run.journal.interruptions
    return Resumed(blocks=run.resumed_blocks, times=times) if times else None


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "numpy", "datasets", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def write(report: Report, run: Run) -> None:
    """Write report and card beside the model."""
    card = run.skeleton.checkpoint.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    write_report(report, run.folder, source_card=text)
