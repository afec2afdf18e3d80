"""Tasks of a recipe: loaded before the work, answered by result and source when the result is written."""

from __future__ import annotations

import time
from dataclasses import replace

from compressor.report.schema import Report, Timing
from compressor.run.plan import Plan
from compressor.run.progress import Voice
from compressor.run.session import Options, Run
from compressor.run.task_names import check_tasks
from compressor.run.tasks import Kept, Tasks, answer, load_tasks
from compressor.run.whole import Found, find_model


def final_tasks(plan: Plan, model: str, options: Options, voice: Voice) -> Tasks | None:
    """Load what the recipe asks for; None where it asks for nothing.

    Raises:
        UserError: as :func:`compressor.run.tasks.load_tasks`; a source without tokenizer, or too large to be asked; an
            answer longer than its context.
    """
    settings = plan.recipe.evaluation
    if not settings.tasks:
        return None
    asked = check_tasks(settings.tasks)
    from compressor.run.task_harness import check_context

    source = Found(model, plan.skeleton, options.trust_remote_code)
    source.check_room()
    tokenizer = source.tokenizer()
    tasks = load_tasks(asked, limit=settings.task_limit, shots=settings.task_shots, voice=voice)
    check_context(tasks.questions, model, tokenizer, source.context)
    return tasks


def answer_tasks(run: Run, tasks: Tasks, report: Report) -> None:
    """Let the written folder and the source answer, and put it into the report. The journal keeps every answer."""
    since = time.perf_counter()
    run.streams.clear()  # two whole models come
    trust = run.options.trust_remote_code
    result = replace(find_model(str(run.folder), trust_remote_code=trust), name=run.options.output.name)
    source = Found(run.source, run.skeleton, trust)
    kept = Kept(run.journal.facts.setdefault("answers", {}), run.journal.write)
    report.tasks = answer(
        tasks, [result, source], dtype=run.recipe.dtype, device=run.recipe.device, voice=run.voice, kept=kept
    )
    report.timings.append(Timing(what="answering tasks", seconds=time.perf_counter() - since))
