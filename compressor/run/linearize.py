"""The main path of linearization: blocks learn alone, layers are chosen, the model learns as a whole, the result is
judged.

Reads top to bottom. The parts that it shares with other runs (planning, journal, publishing) are in ``run/stream.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import yaml
from torch import Tensor, nn

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.journal import write_atomically
from compressor.engine.output import copy_companions, finish_shards, write_shard
from compressor.engine.processes import make_accelerator, together
from compressor.engine.skeleton import build_skeleton
from compressor.engine.tensorfile import Layout, layout_of, read_header, read_tensor, write_file
from compressor.hf.linearized import attention_of
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.report.numbers import bytes_text
from compressor.report.schema import Report
from compressor.run import finish
from compressor.run.distillation import stopwatch, store_predictions, train_student
from compressor.run.inputs import probe_ids
from compressor.run.keep import choose, score_layers
from compressor.run.linear_plan import kept_count
from compressor.run.linear_report import linearization, proved
from compressor.run.linear_target import Target, target_of
from compressor.run.longer import joined_texts
from compressor.run.mixer_files import read_mixer, read_record
from compressor.run.rounds import STREAM, rounds, school_of, teach, tick_of
from compressor.run.session import Run
from compressor.run.transform import open_block
from compressor.run.verify import Verifier
from compressor.run.write import write_config

TRAINED = "trained.safetensors"

MANY = 8
"""Times over the same text from which the report warns."""


def linearize(run: Run, started: str, warnings: list[str]) -> Report:
    """Carry out a recipe whose only stage linearizes. The run is prepared and its folder is held.

    Raises:
        UserError: an attention that cannot be linearized, training that diverges, or a result that does not reload.
    """
    warnings = warnings + repeated(run) + (joined_texts(run.inputs.longer) if run.inputs.longer else [])
    if run.plan.logits_bytes:
        run.voice.say(
            f"the dense model's {_settings(run).top_k} largest predictions of every token will take "
            f"{bytes_text(run.plan.logits_bytes)} in {run.journal.folder.name}"
        )
    accelerator = make_accelerator(run.plan.device)
    accelerator.wait_for_everyone()  # those that help read the journal now
    verifier = Verifier(run.recipe, run.folder, run.plan) if run.recipe.verify else None
    try:
        since = time.perf_counter()
        run.runner.load_outer()
        run.streams = _start(run)
        run.timed("embedding the token windows", since)
        _transfer(run, accelerator)
        layers = _choose(run)
        _distill(run, layers, accelerator)
        return _finish(run, layers, verifier, started, warnings)
    finally:
        if verifier is not None:
            verifier.stop()


def repeated(run: Run) -> list[str]:
    """A warning where training goes over the same text so often that it may be learnt by heart."""
    assert run.inputs.calibration is not None
    windows, found = run.inputs.calibration.ids, []
    sets = [(max(_settings(run).stages), windows, "")]
    if run.plan.longer is not None and run.inputs.longer is not None:
        sets.append((run.plan.longer.tokens, run.inputs.longer.ids, " in long windows"))
    for tokens, ids, where in sets:
        if tokens > MANY * ids.numel():
            found.append(
                f"trained {tokens / ids.numel():.0f} times over the same {ids.numel():,} tokens{where}: a larger "
                f"--nsamples ({len(windows)} now) gives it more text"
            )
    return found


def _settings(run: Run) -> LinearizeSettings:
    settings = run.recipe.stages[0].settings
    assert isinstance(settings, LinearizeSettings)
    return settings


def _target(run: Run) -> Target:
    return target_of(run.recipe.stages[0], run.skeleton)


def _start(run: Run) -> dict[str, Stream]:
    """One stream of training windows, one of evaluation windows; both go through the dense model."""
    assert run.inputs.calibration is not None  # such a stage needs data
    streams = {STREAM: run.runner.start(run.inputs.calibration.ids)}
    if run.inputs.texts is not None:
        streams["dense"] = run.runner.start(run.inputs.texts.ids)
    if run.journal.blocks:
        run.resumed_blocks = len(run.journal.blocks)
        run.voice.say(f"resuming after block {run.resumed_blocks} of {run.blocks}")
        for name, states in run.journal.load_states().items():
            streams[name].states = states
    return streams


def _transfer(run: Run, accelerator: Any) -> None:
    """Stage 1: every block's memory learns by itself, with every process there is; the journal remembers each round."""
    school, journal, done = school_of(run.plan, run.runner, run.journal.folder), run.journal, len(run.journal.blocks)
    tokens = school.lesson.tokens
    with run.voice.progress(run.blocks * tokens, done=done * tokens) as ticker:
        for part in rounds(range(done, run.blocks), school.kept, accelerator.num_processes):
            since, records = time.perf_counter(), list[dict[str, Any]]()

            def visit(block: int, records: list[dict[str, Any]] = records) -> None:
                work = open_block(run.skeleton, [linear for linear in run.skeleton.linears if linear.block == block])
                records.append({"layers": list(work.layers.values()), "experts": [], "baseline": None})

            tick = tick_of(part, ticker)
            with together(accelerator):
                teach(part, 0, school, run.streams.values(), run.streams[STREAM], tick, visit)
            for record, (block, owner) in zip(records, part, strict=True):
                if owner is not None:
                    found = record["transfer"] = read_record(journal.folder, block)
                    run.voice.detail(f"block {block + 1}: relative error {found['before']:.3g} -> {found['after']:.3g}")
            run.timed("attention transfer", since)
            journal.finish_blocks(records, {name: stream.states for name, stream in run.streams.items()})
            ticker.reach(len(journal.blocks) * tokens)


def _choose(run: Run) -> list[int]:
    """Choose the layers that stay softmax; return those that are linearized."""
    settings, facts, since = _settings(run), run.journal.facts, time.perf_counter()
    count = kept_count(settings, run.blocks)
    if "kept" not in facts:
        scores: list[float] = []
        kept = sorted(set(settings.keep_layers))
        if count and not kept:
            with run.voice.meanwhile("scoring the layers"):
                scores = _scores(run, settings)
            kept = choose(settings.select, count, scores)
        facts |= {"kept": kept, "scores": scores}
        run.journal.write()
        if scores and settings.select != "even":
            order = sorted(range(run.blocks), key=lambda i: scores[i], reverse=settings.select != "kl-add")
            shown = ", ".join(f"{layer}: {scores[layer]:.3g}" for layer in order)
            stay = f"{'layer' if len(kept) == 1 else 'layers'} {', '.join(map(str, kept))}"
            how = f"by {settings.select} (layer: score): {shown}"
            run.voice.say(f"staying softmax attention: {stay}, chosen {how}")
    run.timed("choosing layers", since)
    return [layer for layer in range(run.blocks) if layer not in facts["kept"]]


def _scores(run: Run, settings: LinearizeSettings) -> list[float]:
    if settings.select in ("error", "even"):
        return [record["transfer"]["after"] for record in run.journal.blocks]
    students = _target(run).students
    assert run.inputs.calibration is not None
    ids = run.inputs.calibration.ids
    ids = ids[: max(1, settings.select_tokens // ids.shape[1])]

    def student(block: int) -> nn.Module:
        module = students.make(attention_of(run.skeleton.blocks[block])[1], block)
        students.take(module, read_mixer(run.journal.folder, block))
        return module

    return score_layers(run.runner, ids, student, add=settings.select == "kl-add")


def _distill(run: Run, layers: list[int], accelerator: Any) -> None:
    """Stages 2 and 3: the model as a whole, on longer windows at last, with every process there is; leaves the trained
    tensors in a file."""
    settings, folder, since = _settings(run), run.journal.folder, time.perf_counter()
    if settings.trained == "none":
        return
    finished = "distilled" in run.journal.facts
    if _target(run).trains_written and not finished:
        _write(run, layers)
    if settings.store_logits and not finished:
        _store_logits(run)
    accelerator.wait_for_everyone()  # those that help read the journal now
    if finished:
        return
    longer = run.plan.longer.tokens if run.plan.longer else 0
    with run.voice.progress(settings.stages[1] + longer) as ticker:
        tick = stopwatch(ticker.advance, ticker.now)
        found, tensors, count = train_student(run.plan, run.options, layers, run.inputs, folder, accelerator, tick)
    write_file(folder / TRAINED, layout_of(tensors.items()), tensors.__getitem__)
    run.journal.facts["distilled"] = {
        "curve": found.curve, "trained": settings.trained, "parameters": count, "short": found.ends[0],
    }  # fmt: skip
    run.journal.write()
    run.timed("distillation", since)


def _store_logits(run: Run) -> None:
    """Put the dense model's predictions on disk: those behind its last block are here, longer windows pass it anew."""
    since, tokens = time.perf_counter(), run.streams["stage 0"].ids.numel()
    tokens += run.inputs.longer.ids.numel() if run.inputs.longer else 0
    with run.voice.progress(tokens) as ticker:
        ticker.now("storing the dense model's predictions")
        run.journal.facts["logits bytes"] = store_predictions(
            run.plan, run.runner, run.streams["stage 0"], run.inputs, run.journal.folder, ticker.advance
        )
    run.timed("storing the dense model's predictions", since)


def _write(run: Run, layers: list[int]) -> list[Layout]:
    """Write the folder: what became of source and students, with what was trained end to end in its place."""
    skeleton, folder, target = run.skeleton, run.folder, _target(run)
    for left in folder.glob("model*.safetensors"):  # of an interrupted run, or from before the end of training
        left.unlink()
    trained = read_header(run.journal.folder / TRAINED) if "distilled" in run.journal.facts else {}
    layouts: list[Layout] = []
    for number in range(run.blocks + 1):
        layout, plain = target.shard(number, layers, run.journal.folder)

        def read(name: str, layout: Layout = layout, plain: Callable[[str], Tensor] = plain) -> Tensor:
            return read_tensor(trained[name]).to(layout[name][0]) if name in trained else plain(name)

        write_shard(folder, number + 1, run.blocks + 1, layout, read)
        layouts.append(layout)
    finish_shards(folder, len(layouts))
    copy_companions(skeleton.checkpoint.folder, folder)
    write_config(folder, target.config(layers))
    recipe = yaml.safe_dump(run.recipe.resolved(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "recipe.yaml", recipe)
    return layouts


def _finish(run: Run, layers: list[int], verifier: Verifier | None, started: str, warnings: list[str]) -> Report:
    """Write, reload in a fresh process, evaluate what was written, and report."""
    since = time.perf_counter()
    layouts = _write(run, layers)
    run.timed("packing and writing", since)
    since = time.perf_counter()
    result = build_skeleton(open_checkpoint(run.folder))
    runner = BlockRunner(result, device=run.plan.device, dtype=run.plan.dtype)
    runner.load_outer()
    streams = {"probe": runner.start(probe_ids(run.inputs, run.skeleton.config))}
    if run.inputs.texts is not None:
        streams["compressed"] = runner.start(run.inputs.texts.ids)
    for block in range(run.blocks):
        runner.load_block(block)
        for stream in streams.values():
            runner.step(block, stream)
        runner.release_block(block)
    run.timed("evaluating", since)
    verification = None
    if verifier is not None:
        since = time.perf_counter()
        logits = runner.logits(streams["probe"], slice(0, 1))
        with run.voice.meanwhile("reloading the result in a fresh process"):
            verification = verifier.check(streams["probe"].ids, logits, run.inputs.texts).verification
        run.timed("verifying in a fresh process", since)
    since = time.perf_counter()
    evaluation = []
    if run.inputs.texts is not None:
        label = run.recipe.stages[0].label
        models = {
            "dense": ("dense", run.runner, run.streams["dense"]),
            "compressed": (label, runner, streams["compressed"]),
        }
        with run.voice.meanwhile("measuring on the evaluation texts"):
            evaluation = finish.evaluations(models, run)
    run.timed("evaluating", since)
    since = time.perf_counter()
    proof, missing = proved(run)
    run.timed("proving", since)
    runtimes = verifier.runtimes if verifier is not None else []
    report = finish.make_report(run, {}, evaluation, verification, started, warnings + missing, layouts, runtimes)
    report.linearization = linearization(run, layers, proof)
    return report
