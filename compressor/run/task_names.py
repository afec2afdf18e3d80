"""What ``--tasks`` may name: files of questions, files and folders of the harness, and its own tasks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from compressor.errors import UserError
from compressor.run.task_files import TaskFile, read_task_file

QUESTIONS = (".jsonl", ".json")
HARNESS = (".yaml", ".yml")


@dataclass
class Asked:
    """Tasks that were asked for, sorted by where they come from.

    Attributes:
        files: of questions.
        yaml_files: tasks of the harness, each in a file; ``folders``: all that lie in a folder.
        names: of tasks that come with the harness.
    """

    files: list[TaskFile] = field(default_factory=list)
    yaml_files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def sort_tasks(words: Sequence[str]) -> Asked:
    """Sort out the words of ``--tasks``, each with commas between names; files of questions are read.

    Raises:
        UserError: no task, a file that is missing, or one that holds something else.
    """
    asked = Asked()
    for name in (part.strip() for word in words for part in word.split(",")):
        if not name:
            continue
        path = Path(name).expanduser()
        if path.suffix in QUESTIONS and path.is_file():
            asked.files.append(read_task_file(path))
        elif path.suffix in HARNESS and path.is_file():
            asked.yaml_files.append(path)
        elif path.is_dir():
            asked.folders.append(path)
        elif path.suffix in (*QUESTIONS, *HARNESS) or "/" in name:
            raise UserError(
                f"no task file at {name!r}", fix="give a .jsonl file of questions, a .yaml task of lm-eval, or a name"
            )
        else:
            asked.names.append(name)
    if not (asked.files or asked.yaml_files or asked.folders or asked.names):
        raise UserError("no task was named", fix="--tasks NAME_OR_FILE")
    return asked


def check_tasks(words: Sequence[str]) -> Asked:
    """Sort out what was asked for, without the harness.

    Args:
        words: files of questions (``run/task_files.py``), YAML files or folders of the harness, names of its tasks.

    Raises:
        UserError: lm-eval is not installed; a file that is missing or holds something else.
    """
    if find_spec("lm_eval") is None:
        raise UserError("tasks need EleutherAI's lm-eval", fix='pip install "compressor[tasks]"')
    return sort_tasks(words)


def unknown_task(name: str, known: Iterable[str]) -> UserError:
    """The complaint about a name that the harness does not know; there are thousands, so only the nearest are told."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if close:
        return UserError(f"unknown task {name!r}", fix=f"did you mean {' or '.join(map(repr, close))}?")
    return UserError(f"unknown task {name!r}", fix="'lm-eval ls tasks' lists them; a file of questions ends in .jsonl")
