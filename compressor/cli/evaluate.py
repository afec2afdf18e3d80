"""``compressor evaluate``: perplexity, and distance to another model, on held-out text; questions of task files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.common import Json, Model, Quiet, TrustRemoteCode, Verbose, make_voice, print_json
from compressor.engine.imports import uncollected
from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.report.schema_use import TaskResult

TASKS = "Tasks"


def evaluate(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="The model it was made from: adds KL divergence and agreement; is asked the same tasks."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Named text or file; may be given several times.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", help="Windows of each text (default: all).", min=1)
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens in a window (default: 2048, or the model's context).", min=2)
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Step between windows (default: seqlen, they do not overlap).", min=1)
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the BOS token.")] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="File of questions (.jsonl), task file or folder of lm-eval (.yaml), or name of one of its tasks; "
            "with commas, or several times. Texts are measured as well only if --text is given.",
            metavar="NAME_OR_FILE",
            rich_help_panel=TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Questions of each task, the first ones.", min=1, rich_help_panel=TASKS),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", help="Examples before each question (default: as the task has it).", min=0,
            rich_help_panel=TASKS,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Texts computed together.", min=1, rich_help_panel=TASKS)
    ] = 8,
    into_report: Annotated[
        bool,
        typer.Option(
            "--into-report", help="Also put the answers into report and card of MODEL, a folder that compressor wrote.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure perplexity on named or local text; with --against also mean KL divergence and top-1 agreement.

    With --tasks, let the model answer questions through EleutherAI's lm-eval, and say what guessing gives.

    Example: compressor evaluate pruned --against embedded --text embedded-heldout
    """
    given = {"--limit": limit, "--num-fewshot": num_fewshot, "--into-report": into_report or None}
    if not tasks and (alone := [flag for flag, value in given.items() if value is not None]):
        raise UserError(f"{alone[0]} is about tasks, and none was named", fix="--tasks NAME_OR_FILE")
    voice = make_voice(verbose, quiet)
    with uncollected(for_good=True):
        from compressor.cli.show import print_evaluation
        from compressor.run.judge import judge_model

    common: dict[str, Any] = {
        "against": against, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "voice": voice,
    }  # fmt: skip
    answers: list[TaskResult] = []
    if tasks:
        from compressor.run.tasks import into_reports, run_tasks

        note = into_reports(model) if into_report else None
        answers = run_tasks(model, tasks, limit=limit, shots=num_fewshot, batch=batch_size, **common)
        if note is not None:
            for name in note(answers):
                voice.warn(f"{name} was edited by hand, or written by another version, and left as it is")
    result: list[dict[str, Any]] = []
    if text or not tasks:
        texts = tuple(text or ())
        result = judge_model(model, texts=texts, windows=windows, seqlen=seqlen, stride=stride, bos=bos, **common)
    if as_json:
        told = [answer.model_dump(mode="json") for answer in answers]
        print_json({"texts": result, "tasks": told} if tasks else result)
        return
    print_evaluation(result)
    if tasks:
        from compressor.cli.task_tables import print_tasks

        print_tasks(answers)
