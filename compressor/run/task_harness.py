"""EleutherAI's evaluation harness with a model of ours in memory. Imports lm_eval: to be imported late."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from compressor.errors import UserError
from compressor.run.progress import Ticker, Voice, without_bars
from compressor.run.task_files import task_config
from compressor.run.task_names import Asked, unknown_task
from compressor.run.task_scores import Scores, scores_of

SEED = 1234
"""The harness's own: which examples stand before a question, and of answers that are drawn."""

REACHING = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout", "MaxRetryError")
"""Exceptions of a hub that cannot be reached."""

GROUP = re.compile(r"""(?m)^group:\s*["']?([^\s"']+)""")
"""In a YAML file: it names others, which lie beside it."""

DATA = re.compile(r"""(?m)^dataset_path:\s*["']?([^\s"']+)""")
LOCAL = ("json", "csv", "text", "parquet", "arrow")
"""What a YAML file names as its data where these lie in files beside it."""

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In what Python says of a function: another in every process."""

GENERATED = 256
"""Tokens that the harness lets a model write where a task does not say."""


@dataclass(frozen=True)
class Questions:
    """A task, or a group with all that is in it: what is asked together, and scored before the next.

    Attributes:
        tasks: name -> task of the harness, its questions loaded; ``groups``: name -> group of it, outer ones first.
        digest: SHA-256 of what will be asked, in the harness's words, and of how it is scored.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    digest: str

    @property
    def requests(self) -> int:
        """How many answers a model has to give."""
        return sum(len(task.instances) for task in self.tasks.values())

    def reseed(self) -> None:
        """The same examples before each question, whatever was asked before."""
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=SEED)


def load_questions(asked: Asked, shots: int | None, limit: int | None, voice: Voice) -> list[Questions]:
    """Make the harness's tasks, their questions loaded.

    Args:
        shots: examples before each question; None: as the task has it. A task that fixes 0 keeps it.
        limit: questions of each task, the first ones; None: all.

    Raises:
        UserError: an unknown name, or a task whose questions cannot be had or that cannot be run here.
    """
    if far := from_hub(asked):
        voice.say(
            f"reading the questions of {', '.join(far)}: what is not on this disk yet is fetched from the hub, which "
            "may take minutes"
        )
    with _aside(voice):
        found = []
        for tasks, groups in _found(asked):
            for name, task in tasks.items():
                _check(name, task)
                fixed = task.get_config("num_fewshot")
                if fixed == 0 and shots:
                    voice.warn(f"task {name} is always asked without examples")
                task.set_config("num_fewshot", shots if shots is not None and fixed != 0 else fixed or 0)
            found.append(Questions(tasks, groups, _digest(tasks, limit)))
    return found


def from_hub(asked: Asked) -> list[str]:
    """Names of the tasks whose questions are data sets of the hub; the harness fetches them without a word."""
    data = {path: DATA.search(path.read_text("utf-8", "replace")) for path in asked.yaml_files}
    files = [path.name for path, found in data.items() if found and found[1] not in LOCAL]
    return [*files, *asked.names]


def _digest(tasks: dict[str, Any], limit: int | None) -> str:
    """Lets the tasks make their requests, too, which the harness makes anew for each model."""
    told: list[Any] = [version("lm-eval")]
    for name, task in tasks.items():
        task.set_fewshot_seed(seed=SEED)
        try:
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        except Exception as error:
            raise _unloadable(name, error) from error
        told += [name, task.dump_config(), [(each.request_type, each.args, each.doc) for each in task.instances]]
    text = json.dumps(told, default=lambda value: ADDRESS.sub("", str(value)))
    return hashlib.sha256(text.encode()).hexdigest()


Loaded = tuple[dict[str, Any], dict[str, Any]]
"""Tasks and groups by name."""


def _found(asked: Asked) -> list[Loaded]:
    named = {path: told[1] for path in asked.yaml_files if (told := GROUP.search(path.read_text("utf-8", "replace")))}
    folders = [*asked.folders, *(path.parent for path in named)]
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=bool(asked.names))
    found = [_load(manager, file.name, task_config(file)) for file in asked.files]
    found += [_load(manager, path.name, named.get(path, str(path))) for path in asked.yaml_files]
    for folder in asked.folders:
        found += _in_folder(manager, folder)
    for name in asked.names:
        if name not in manager.all_tasks:
            raise unknown_task(name, manager.all_tasks)
        found.append(_load(manager, name, name))
    seen: set[str] = set()
    for tasks, groups in found:
        if twice := seen & (tasks.keys() | groups.keys()):
            raise UserError(f"the task {min(twice)!r} was asked for twice", fix="name each once; rename a file")
        seen |= tasks.keys() | groups.keys()
    return found


def _in_folder(manager: Any, folder: Path) -> list[Loaded]:
    """What the YAML files of a folder define: groups that stand in no other, then tasks that stand in no group.

    Raises:
        UserError: none.
    """
    here = TaskManager(include_path=str(folder), include_defaults=False)
    if not here.all_subtasks:
        raise UserError(f"{folder} holds no task of the harness (a YAML file with 'task')", fix="name a folder or file")
    groups = {name: _load(manager, name, name) for name in here.all_groups}
    outer = [found for name, found in groups.items() if not any(name in g for n, (_, g) in groups.items() if n != name)]
    grouped = {name for tasks, _ in outer for name in tasks}
    return outer + [_load(manager, name, name) for name in here.all_subtasks if name not in grouped]


def _load(manager: Any, name: str, spec: Any) -> Loaded:
    try:
        loaded = manager.load([spec])
    except Exception as error:
        raise _unloadable(name, error) from error
    return loaded["tasks"], loaded["groups"]


def _unloadable(name: str, error: Exception) -> UserError:
    kinds = {type(cause).__name__ for cause in _causes(error)}
    if kinds & set(REACHING):
        return UserError(
            f"the questions of task {name!r} are on the hub, which cannot be reached",
            fix="run it once with a network, or name a local file instead",
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"the harness cannot load task {name!r}: {type(error).__name__}: {first}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name!r} runs code that the model writes, which is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name!r} asks about pictures or sounds", fix="choose a task of text")


def check_context(questions: Sequence[Questions], name: str, tokenizer: Any, context: int | None) -> None:
    """Refuse what a model could not answer however much were cut off the question.

    Args:
        name: of the model, for messages.
        context: longest context in tokens; None: not known, and nothing is refused.

    Raises:
        UserError: an answer that is longer than the context, or that leaves no room for a question.
    """
    if context is None:
        return
    for request in (each for some in questions for task in some.tasks.values() for each in task.instances):
        if request.request_type == "generate_until":
            room = int(request.args[1].get("max_gen_toks", GENERATED))
            if room >= context:
                raise UserError(
                    f"answers of {room} tokens leave no room for a question in the context of {name}, {context} tokens",
                    fix="lower max_gen_toks in the task, or leave it out",
                )
        elif request.request_type == "loglikelihood" and len(request.args[1].encode()) > context:
            length = len(tokenizer(request.args[1])["input_ids"])  # a token is a byte or more
            if length > context:
                raise UserError(
                    f"an answer of {length} tokens is longer than the context of {name}, {context} tokens",
                    fix="leave that task out",
                )


class _Model(HFLM):  # type: ignore[misc]
    """The harness's view of a loaded model: without progress bars, and counting what does not fit the context."""

    def __init__(self, model: Any, tokenizer: Any, batch: int, context: int | None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=context)
        self.cut = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        self.cut += sum(len(text) + len(answer) > self.max_length + 1 for _, text, answer in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for request in requests:
            text, settings = request.args[:2]
            room = self.max_length - int(settings.get("max_gen_toks", GENERATED))
            self.cut += len(self.tok_encode(text)) > room
        return super().generate_until(requests, disable_tqdm=True)


class _Ticks:
    """Stands where the harness tells each answer to a cache: moves the progress on instead."""

    def __init__(self, ticker: Ticker) -> None:
        self.ticker = ticker

    def add_partial(self, *_: Any) -> None:
        self.ticker.advance()


def ask(
    questions: Sequence[Questions], name: str, model: Any, tokenizer: Any, *, batch: int, limit: int | None,
    context: int | None, voice: Voice, done: Callable[[Questions, list[Scores]], None],
) -> None:  # fmt: skip
    """Let a loaded model answer; it has lost its generation settings then. Random generators are left alone.

    Args:
        name: of the model, for messages.
        limit: as the questions were loaded with.
        context: longest context in tokens.
        done: is given the scores of each of ``questions`` as soon as they are there.
    """
    own = model.generation_config
    # how to write is the task's to say: no penalties, samplers and lengths that the model's author likes
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    with _aside(voice):
        harness = _Model(model, tokenizer, batch, context)
        with voice.progress(sum(each.requests for each in questions)) as ticker:
            ticker.now(name)
            harness.set_cache_hook(_Ticks(ticker))
            for each in questions:
                each.reseed()
                random.seed(SEED)
                torch.manual_seed(SEED)
                asked: Any = {"tasks": each.tasks, "groups": each.groups}
                results = evaluate(harness, asked, limit=limit, bootstrap_iters=0, log_samples=True)
                shots = {key: task.get_config("num_fewshot") for key, task in each.tasks.items()}
                types = {key: task.OUTPUT_TYPE for key, task in each.tasks.items()}
                members = {
                    key: [task.task_name for task in group.get_all_tasks()] for key, group in each.groups.items()
                }
                done(each, scores_of(results, shots, types, members))
    if harness.cut:
        voice.warn(
            f"{harness.cut} of the texts are longer than the context of {name} ({harness.max_length} tokens); their "
            "beginnings were cut off"
        )


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
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        random.setstate(state)
