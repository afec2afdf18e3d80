"""The main path: a recipe and a model in, a verified compressed folder and its report out.

Reads top to bottom: :func:`compress` opens and checks everything, then visits the decoder blocks one by one
(:func:`_visit_block`), lets what was asked for learn as a whole, then measures, verifies, reports and publishes.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compressor
from compressor.engine.checkpoint import Checkpoint, open_checkpoint, resolve_model
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.journal import exclusive, open_journal
from compressor.engine.limits import available_memory
from compressor.engine.observe import observe
from compressor.engine.output import (
    check_disk,
    check_output,
    check_working,
    clear_working,
    finish_shards,
    publish,
    working_folder,
)
from compressor.engine.skeleton import Linear, build_skeleton
from compressor.errors import UserError
from compressor.report.schema import Report
from compressor.run import finish, write
from compressor.run.allocate import survey
from compressor.run.baseline import baseline_weight
from compressor.run.decompose import decompose_block
from compressor.run.distill_codes import check_room, learn_together, put_down_codes
from compressor.run.embeddings import code_embeddings, coded_runner
from compressor.run.final_tasks import answer_tasks, final_tasks
from compressor.run.folding import fold_scales
from compressor.run.inputs import Inputs, load_inputs, probe_ids
from compressor.run.linear_plan import linear_stage
from compressor.run.linearize import linearize
from compressor.run.narrow import narrow_block
from compressor.run.plan import Plan, make_plan
from compressor.run.plane_survey import survey_planes
from compressor.run.planes import settled
from compressor.run.progress import Voice, quiet
from compressor.run.rank_survey import survey_ranks
from compressor.run.recipe import Recipe
from compressor.run.samples import asked_of, samples_of
from compressor.run.session import Options, Run
from compressor.run.stage_results import after_stage
from compressor.run.task_plan import foreseen_tasks
from compressor.run.transform import BlockWork, apply_stage, open_block, pack_block
from compressor.run.tuning import prepare_stage, tune_stage
from compressor.run.verify import Verifier

__all__ = ["Options", "compress", "foresee"]


def foresee(
    recipe: Recipe, model: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[Checkpoint, Plan]:
    """Open a model's headers and plan a recipe on it. Reads no weights.

    Args:
        recipe: what would be done.
        model: local folder, hub id, or ``embedded``.
        trust_remote_code: run code that the model's folder brings along.
        revision: branch, tag or commit of a hub id.

    Returns:
        The headers, and the plan: ``violations`` in words, ``specs`` of matrices, ``output_bytes``, ``memory_bytes``.

    Raises:
        UserError: anything wrong with the model folder, or with the recipe on this model.
    """
    checkpoint = open_checkpoint(resolve_model(model, revision=revision))
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    tasks = foreseen_tasks(recipe.evaluation)
    return checkpoint, replace(make_plan(checkpoint, skeleton, recipe), tasks=tasks)


@torch.no_grad()
def compress(recipe: Recipe, model: str, options: Options, voice: Voice | None = None) -> Report:
    """Carry out a recipe on a model.

    Args:
        recipe: what to do.
        model: local folder, hub id, or ``embedded``.
        options: output folder and run-time choices.
        voice: how to speak; by default nothing but warnings, on standard error.

    Returns:
        The report, as written to ``report.json`` in the output folder.

    Raises:
        UserError: anything the user can mend; the input is untouched and no output folder exists.
    """
    voice = voice or quiet()
    options = replace(options, output=Path(os.path.abspath(options.output)))  # noqa: PTH100  # "." needs a name
    began, started = time.perf_counter(), finish.utc_now()
    checkpoint, plan = foresee(recipe, model, trust_remote_code=options.trust_remote_code, revision=options.revision)
    if options.own_process:
        gc.freeze()
    plan.refuse()
    check_output(options.output, checkpoint.folder, overwrite=options.overwrite)
    check_disk(options.output, plan.disk_bytes)
    check_room(plan)
    tasks = final_tasks(plan, model, options, voice)
    warnings = [*_memory_warning(plan), *plan.notes]
    inputs = load_inputs(plan, model, options.trust_remote_code, voice)
    digest = _read_through(checkpoint, voice)
    work = working_folder(options.output)
    check_working(work)
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work):
        if options.fresh or not (work / "model").exists():  # to be forgotten, or killed after it was published
            clear_working(work)
        (work / "model").mkdir(exist_ok=True)
        journal = open_journal(work, _fingerprint(recipe, digest, inputs, plan))
        runner = BlockRunner(plan.skeleton, device=plan.device, dtype=plan.dtype)
        run = Run(recipe, options, model, plan.skeleton, plan, inputs, runner, runner, journal, voice)
        run.timed("reading and checking the input", began)
        carry_out = linearize if linear_stage(recipe.stages) else _compress
        report = carry_out(run, started, warnings)
        if tasks is not None:
            answer_tasks(run, tasks, report)
        report.tool.seconds = time.perf_counter() - began
        finish.write(report, run)
    publish(run.folder, options.output)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _compress(run: Run, started: str, warnings: list[str]) -> Report:
    """Visit the blocks, each through all stages, and finish."""
    _prepare(run)
    verifier = Verifier(run.recipe, run.folder, run.plan) if run.recipe.verify else None
    try:
        with run.voice.progress(run.blocks, done=len(run.journal.blocks)) as ticker:
            for block in range(len(run.journal.blocks), run.blocks):
                ticker.now(f"block {block + 1}")
                run.journal.finish_block(_visit_block(run, block), _states(run))
                ticker.advance()
        learn_together(run)
        return _finish(run, verifier, started, warnings)
    finally:
        if verifier is not None:
            verifier.stop()


def _memory_warning(plan: Plan) -> list[str]:
    free = available_memory()
    if plan.memory_bytes <= free:
        return []
    return [
        f"the run may need {plan.memory_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
        "lower --nsamples, --seqlen or --eval-windows if it runs out"
    ]


def _read_through(checkpoint: Checkpoint, voice: Voice) -> str:
    """Read every tensor once: refuse NaN before the work, and know the input well enough to resume on it."""
    with voice.progress(checkpoint.nbytes) as ticker:
        ticker.now("checking the input")
        for name, size, result in checkpoint.digest():
            if not name:
                return str(result)
            if result is not None:
                raise UserError(f"tensor {name!r} {result}", fix="start from a sound checkpoint")
            ticker.advance(size)
    raise AssertionError("a digest ends with its hash")


def _fingerprint(recipe: Recipe, digest: str, inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """Everything that decides the bytes of the output."""
    resolved = recipe.resolved()
    return {
        "compressor": compressor.__version__,
        "input": digest,
        "recipe": {"stages": resolved["stages"], "save": recipe.save},
        "evaluation": [text.sha256 for text in inputs.texts.texts] if inputs.texts else [],
        "baseline": recipe.evaluation.baseline,
        "calibration": inputs.calibration.sha256 if inputs.calibration else None,
        "longer": inputs.longer.sha256 if inputs.longer else None,
        "device": plan.device.type,
        "dtype": str(plan.dtype),
        "torch": torch.__version__,
    }


def _prepare(run: Run) -> None:
    """Load what stays resident, write the outer tensors, survey where an allocation wants it, start the streams."""
    since = time.perf_counter()
    run.runner.load_outer()
    run.codes = code_embeddings(run.skeleton, run.recipe)
    run.coded = coded_runner(run.runner, run.codes)
    if "outer" not in run.journal.facts:
        write.write_outer(run.folder, run.plan, run.codes)
        run.journal.facts["outer"] = True
        run.journal.write()
    run.timed("embedding the token windows", since)
    since = time.perf_counter()
    if "sparsities" not in run.journal.facts:
        run.journal.facts["sparsities"] = [survey(run, number) for number in range(len(run.recipe.stages))]
        run.journal.write()
    if "planes" not in run.journal.facts:
        run.journal.facts["planes"] = [survey_planes(run, number) for number in range(len(run.recipe.stages))]
        run.journal.write()
    if "ranks" not in run.journal.facts:
        run.journal.facts["ranks"] = [survey_ranks(run, number) for number in range(len(run.recipe.stages))]
        run.journal.write()
    run.ranks = run.journal.facts["ranks"]
    run.timed("surveying the model", since)
    since = time.perf_counter()
    run.stages = [
        settled(stage, found) for stage, found in zip(run.recipe.stages, run.journal.facts["planes"], strict=True)
    ]
    run.streams = start_streams(run)
    if run.journal.blocks:
        run.resumed_blocks = len(run.journal.blocks)
        run.voice.say(f"resuming after block {run.resumed_blocks} of {run.blocks}")
        for name, states in run.journal.load_states().items():
            run.streams[name].states = states
    run.timed("embedding the token windows", since)


def start_streams(run: Run) -> dict[str, Stream]:
    """One stream of calibration windows for each stage that needs one, one of evaluation windows for each model."""
    wanted: dict[str, Tensor] = {}
    if run.inputs.calibration is not None:
        for number, stage in enumerate(run.recipe.stages):
            if stage.needs_data:
                wanted[f"stage {number}"] = run.inputs.calibration.ids
            if stage.needs_reference:
                wanted[f"stage {number} before"] = run.inputs.calibration.ids
    if run.inputs.texts is not None:
        for who in ("dense", "compressed", *(["baseline"] if run.recipe.evaluation.baseline else [])):
            wanted[who] = run.inputs.texts.ids
    started: dict[tuple[int, int], Stream] = {}
    streams = {}
    for name, ids in wanted.items():
        key = id(run.outer(name)), id(ids)
        streams[name] = started[key].copy() if key in started else started.setdefault(key, run.outer(name).start(ids))
    streams["probe"] = run.coded.start(probe_ids(run.inputs, run.skeleton.config))
    return streams


def _states(run: Run) -> dict[str, Tensor]:
    return {name: stream.states for name, stream in run.streams.items()}


def _visit_block(run: Run, block: int) -> dict[str, Any]:
    """Transform one block by every stage, send every stream through its version of it, write it, and let it go."""
    since = time.perf_counter()
    linears = [linear for linear in run.skeleton.linears if linear.block == block]
    run.runner.load_block(block)
    work = open_block(run.skeleton, linears)
    if "dense" in run.streams:
        run.runner.step(block, run.streams["dense"])
        run.timed("evaluating", since)
    experts: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    for number, stage in enumerate(run.stages):
        chosen = [linear for linear in run.plan.targets[number] if linear.block == block]
        stream = run.streams.get(f"stage {number}")
        if stage.kind == "decompose":
            since = time.perf_counter()
            if run.plan.narrowing is not None:
                narrow_block(run, number, block, work)
            else:
                experts = decompose_block(run, number, block, chosen, work)
            run.timed("solving", since)
            left.append(after_stage(work, chosen))
            _pass_on(run, block, stream)
            continue
        reference = run.streams.get(f"stage {number} before")
        seen, since = None, time.perf_counter()
        if stream is not None and chosen:
            seen = observe(run.runner, block, chosen, stream, reference)
            experts = finish.expert_tokens(chosen, seen)
        run.timed("gathering statistics", since)
        since = time.perf_counter()
        if reference is not None:
            run.runner.step(block, reference)
        if stream is not None and seen is not None:
            fold_scales(stage, chosen, work, seen, run.runner, block, stream)
        if stage.prepared and stream is not None and seen is not None and reference is not None:
            prepare_stage(stage, chosen, work, seen, run.runner, block, stream, reference.states)
        before = {linear.name: work.weights[linear.name].dense() for linear in chosen} if stage.tuned else {}
        sparsity = run.journal.facts["sparsities"][number]
        total = stream.ids.numel() if stream is not None else 0
        apply_stage(stage, chosen, work, seen, sparsity[block] if sparsity else None, run.runner, total)
        run.timed("solving", since)
        by_block = stage.tuned and not stage.end_to_end
        if by_block and stream is not None and reference is not None and chosen:
            since = time.perf_counter()
            tune_stage(stage, chosen, work, before, run.runner, block, stream, reference.states)
            run.timed("learning", since)
        left.append(after_stage(work, chosen))
        _pass_on(run, block, stream)
    since = time.perf_counter()
    for name in run.outputs:
        if not run.end_to_end:
            run.runner.step(block, run.streams[name])
    baseline = _baseline(run, block, linears, work)
    run.timed("evaluating", since)
    since = time.perf_counter()
    specs, parts = pack_block(work, linears)
    if run.end_to_end:
        put_down_codes(run, block, parts)
    else:
        write.write_block(run.folder, run.plan, block, specs, parts, work)
    run.runner.release_block(block)
    run.timed("packing and writing", since)
    layers = list(work.layers.values())
    return {"specs": specs, "layers": layers, "baseline": baseline, "experts": experts, "stages": left}


def _pass_on(run: Run, block: int, stream: Stream | None) -> None:
    since = time.perf_counter()
    if stream is not None and block < run.blocks - 1:
        run.runner.step(block, stream)
    run.timed("passing on calibration states", since)


def _baseline(run: Run, block: int, linears: list[Linear], work: BlockWork) -> dict[str, Any] | None:
    """Send the baseline's stream through plain roundings of the same size."""
    if "baseline" not in run.streams:
        return None
    facts = {}
    for name in work.folded:
        run.runner.set_weight(name, work.unfolded[name])
    for linear in linears:
        weight, facts[linear.name] = baseline_weight(work, linear)
        run.runner.set_weight(f"{linear.name}.weight", weight.T if linear.transposed else weight)
    run.runner.step(block, run.streams["baseline"])
    return facts


def _finish(run: Run, verifier: Verifier | None, started: str, warnings: list[str]) -> Report:
    """Make the folder complete, measure, verify in a fresh process, and report."""
    since = time.perf_counter()
    blocks = {name: spec for record in run.journal.blocks for name, spec in record["specs"].items()}
    specs = {**run.plan.outer_specs, **blocks}
    finish_shards(run.folder, run.blocks + 1)
    write.write_companions(run.folder, run.plan, specs)
    run.timed("packing and writing", since)
    verification, said, asked = None, None, asked_of(run)
    if verifier is not None:
        since = time.perf_counter()
        probe = run.streams["probe"]
        with run.voice.meanwhile("reloading the result in a fresh process"):
            checked = verifier.check(probe.ids, run.coded.logits(probe, slice(0, 1)), run.inputs.texts, asked)
        verification, said = checked.verification, checked.said
        run.timed("verifying in a fresh process", since)
    since = time.perf_counter()
    with run.voice.meanwhile("measuring on the evaluation texts"):
        evaluation = finish.evaluate(run)
    run.timed("evaluating", since)
    runtimes = verifier.runtimes if verifier is not None else []
    report = finish.make_report(run, specs, evaluation, verification, started, warnings, runtimes=runtimes)
    report.samples, report.samples_skipped = samples_of(asked, said, run.inputs.tokenizer)
    return report
