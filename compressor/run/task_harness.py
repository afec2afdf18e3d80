"""EleutherAI's evaluation harness with a model of ours in memory. Imports lm_eval: to be imported late."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from compressor.errors import UserError
from compressor.run.progress import Ticker, Voice, without_bars
from compressor.run.task_names import Asked, unknown_task
from compressor.run.task_scores import Scores, scores_of

SEED = 1234
"""The harness's own: which examples stand before a question, and of answers that are drawn."""

REACHING = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout", "MaxRetryError")
"""Exceptions of a hub that cannot be reached."""


def load_tasks(asked: Asked, shots: int | None, voice: Voice) -> dict[str, Any]:
    """Make the harness's tasks by name, their questions loaded.

    Args:
        shots: examples before each question; None: as the task has it. A task that fixes 0 keeps it.

    Raises:
        UserError: an unknown name, or a task whose questions cannot be had or that cannot be run here.
    """
    with _aside(voice):
        found = _found(asked)
    for name, task in found.items():
        _check(name, task)
        fixed = task.get_config("num_fewshot")
        if fixed == 0 and shots:
            voice.warn(f"task {name} is always asked without examples")
        task.set_config("num_fewshot", shots if shots is not None and fixed != 0 else fixed or 0)
        task.set_fewshot_seed(seed=SEED)
    return found


def _found(asked: Asked) -> dict[str, Any]:
    manager = TaskManager(include_path=[str(folder) for folder in asked.folders], include_defaults=bool(asked.names))
    wanted: list[tuple[str, Any]] = [(config["task"], config) for config in asked.configs]
    wanted += [(path.name, str(path)) for path in asked.yaml_files]
    wanted += [(name, name) for folder in asked.folders for name in tasks_in(folder)]
    for name in asked.names:
        if name not in manager.all_tasks:
            raise unknown_task(name, manager.all_tasks)
        wanted.append((name, name))
    found: dict[str, Any] = {}
    for name, spec in wanted:
        loaded = _load(manager, name, spec)
        if twice := found.keys() & loaded.keys():
            raise UserError(f"the task {min(twice)!r} was asked for twice", fix="name each once; rename a file")
        found |= loaded
    return found


def tasks_in(folder: Path) -> list[str]:
    """Names of the single tasks that the YAML files of a folder define.

    Raises:
        UserError: none.
    """
    names: list[str] = TaskManager(include_path=str(folder), include_defaults=False).all_subtasks
    if not names:
        raise UserError(f"{folder} holds no task of the harness (a YAML file with 'task')", fix="name a folder or file")
    return names


def _load(manager: Any, name: str, spec: Any) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = manager.load([spec])["tasks"]
    except Exception as error:
        kinds = {type(cause).__name__ for cause in _causes(error)}
        if kinds & set(REACHING):
            raise UserError(
                f"the questions of task {name!r} are on the hub, which cannot be reached",
                fix="run it once with a network, or give a local file to --tasks",
            ) from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the harness cannot load task {name!r}: {type(error).__name__}: {first}") from error
    return tasks


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name!r} runs code that the model writes, which is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name!r} asks about pictures or sounds", fix="choose a task of text")


class _Model(HFLM):  # type: ignore[misc]
    """The harness's view of a loaded model: without progress bars, and refusing what does not fit the context."""

    def __init__(self, model: Any, tokenizer: Any, batch: int, context: int | None, name: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=context)
        self.name = name
        self.cut = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"an answer of {longest} tokens is longer than the context of {self.name}, {self.max_length} tokens",
                fix="leave that task out",
            )
        self.cut += sum(len(text) + len(answer) > self.max_length + 1 for _, text, answer in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for request in requests:
            text, settings = request.args[:2]
            room = self.max_length - int(settings.get("max_gen_toks", self.max_gen_toks))
            if room < 1:
                raise UserError(
                    f"answers of {self.max_length - room} tokens leave no room for a question in the context of "
                    f"{self.name}, {self.max_length} tokens",
                    fix="lower max_gen_toks in the task, or leave it out",
                )
            self.cut += len(self.tok_encode(text)) > room
        return super().generate_until(requests, disable_tqdm=True)


class _Ticks:
    """Stands where the harness tells each answer to a cache: moves the progress on instead."""

    def __init__(self, ticker: Ticker) -> None:
        self.ticker = ticker

    def add_partial(self, *_: Any) -> None:
        self.ticker.advance()


def ask(
    tasks: dict[str, Any], name: str, model: Any, tokenizer: Any, *, batch: int, limit: int | None,
    context: int | None, voice: Voice,
) -> list[Scores]:  # fmt: skip
    """Let a loaded model answer tasks; it has lost its generation settings then. Random generators are left alone.

    Args:
        name: of the model, for messages.
        limit: questions of each task, the first ones; None: all.
        context: longest context in tokens.

    Raises:
        UserError: an answer that is longer than the context.
    """
    own = model.generation_config
    # how to write is the task's to say: no penalties, samplers and lengths that the model's author likes
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    with _aside(voice):
        harness = _Model(model, tokenizer, batch, context, name)
        with voice.progress(_requests(tasks, limit)) as ticker:
            ticker.now(name)
            harness.set_cache_hook(_Ticks(ticker))
            results = evaluate(harness, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    if harness.cut:
        voice.warn(
            f"{harness.cut} of the texts are longer than the context of {name} ({harness.max_length} tokens); their "
            "beginnings were cut off"
        )
    types = {key: task.OUTPUT_TYPE for key, task in tasks.items()}
    return scores_of(results, {key: task.get_config("num_fewshot") for key, task in tasks.items()}, types)


def _requests(tasks: dict[str, Any], limit: int | None) -> int:
    """About how many answers will be computed."""
    total = 0
    for task in tasks.values():
        docs = task.eval_docs
        choices = len(task.doc_to_choice(docs[0])) if task.OUTPUT_TYPE == "multiple_choice" else 1
        total += min(limit or len(docs), len(docs)) * choices
    return total


@contextmanager
def _aside(voice: Voice) -> Iterator[None]:
    """Within, what the harness logs is a detail, its bars are not drawn, and its random numbers are its own."""

    class Details(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            voice.detail(f"lm-eval: {record.getMessage()}")

    logger, handler = logging.getLogger("lm_eval"), Details(logging.WARNING)
    before, state = logger.propagate, random.getstate()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with without_bars(), torch.random.fork_rng():
            random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        random.setstate(state)
