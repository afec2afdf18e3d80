"""Tasks in plain files: a question a line, in JSON; no network, no data set to download, no code.

A file is of one kind, which its fields say:

==================================================  =====================================================
``{"query", "choices", "gold"}``                    one of several answers: the likeliest choice counts
``{"context_options", "continuation", "gold"}``     one of several beginnings, judged by how it goes on
``{"context", "continuation"}``                     one answer, which must be the likeliest at every token
``{"query", "answer"}``                             the model writes until the line ends; must be ``answer``
==================================================  =====================================================

``gold`` counts from 0. ``answer`` is a text, or a list of texts of which one must be hit. Optional beside it, the same
on every line: ``pattern``, a regular expression whose last match (its first group, where it has one) is what the model
answered, and ``until``, the text at which it stops (default: the end of the line). A space is put between a text and
what follows it, unless every text of the file ends in white space. Where every ``query`` begins with ``Question:``,
``Answer:`` is put before the answer. The names of the first three kinds are those of llm-foundry's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compressor.errors import UserError

Kind = Literal["choices", "beginnings", "continuation", "written"]

FIELDS: dict[Kind, tuple[str, ...]] = {
    "choices": ("query", "choices", "gold"),
    "beginnings": ("context_options", "continuation", "gold"),
    "continuation": ("context", "continuation"),
    "written": ("query", "answer"),
}
OPTIONAL = {"pattern", "until"}
"""Beside ``answer`` only."""

SPLIT = "test"
LONGEST_ANSWER = 256
"""Tokens that are written at most."""


@dataclass(frozen=True)
class TaskFile:
    """A file of questions. ``rows`` have the fields of its kind, checked; ``extra`` those that hold for all of it."""

    path: Path
    kind: Kind
    rows: list[dict[str, Any]]
    extra: dict[str, str]

    @property
    def name(self) -> str:
        return self.path.stem


def read_task_file(path: Path) -> TaskFile:
    """Read and check a file of questions.

    Raises:
        UserError: unreadable, empty, or a line that is not of the file's kind; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read the task file {str(path)!r}: {reason}") from error
    rows: list[dict[str, Any]] = []
    first: tuple[Kind, dict[str, str]] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path.name} line {number}: not JSON ({error})", fix="one JSON object a line") from error
        try:
            kind, extra = _kind(row), {key: row.pop(key) for key in sorted(OPTIONAL & row.keys())}
            rows.append(_checked(kind, row, extra))
        except ValueError as error:
            raise UserError(f"{path.name} line {number}: {error}") from error
        first = first or (kind, extra)
        if (kind, extra) != first:
            raise UserError(
                f"{path.name} line {number} is of another kind than the first line", fix="put them into two files"
            )
    if first is None:
        raise UserError(f"the task file {path.name} holds no question")
    return TaskFile(path, first[0], rows, first[1])


def _kind(row: Any) -> Kind:
    if isinstance(row, dict):
        for kind, fields in FIELDS.items():
            if set(fields) <= row.keys():
                return kind
    kinds = "; ".join(", ".join(fields) for fields in FIELDS.values())
    raise ValueError(f"has the fields of no kind of question (known: {kinds})")


def _checked(kind: Kind, row: dict[str, Any], extra: dict[str, str]) -> dict[str, Any]:
    fields = FIELDS[kind]
    row = {field: row[field] for field in fields}
    for field in ("query", "context", "continuation"):
        if field in row and (not isinstance(row[field], str) or not row[field].strip()):
            raise ValueError(f"{field!r} is no text")
    if kind in ("choices", "beginnings"):
        options = row["choices" if kind == "choices" else "context_options"]
        if not (isinstance(options, list) and all(isinstance(each, str) and each for each in options)):
            raise ValueError("the choices are no list of texts")
        if not isinstance(row["gold"], int) or isinstance(row["gold"], bool) or not 0 <= row["gold"] < len(options):
            raise ValueError(f"'gold' is {row['gold']!r}, expected 0 to {len(options) - 1}")
    if kind == "written":
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
            raise ValueError("'answer' is neither a text nor a list of texts")
        row["answer"] = answers
        if not all(isinstance(value, str) and value for value in extra.values()):
            raise ValueError("'pattern' and 'until' are texts")
        try:
            re.compile(extra.get("pattern", ""))
        except re.error as error:
            raise ValueError(f"'pattern' is no regular expression ({error})") from error
    elif extra:
        raise ValueError(f"{', '.join(map(repr, extra))} only stands beside 'answer'")
    return row


def task_config(file: TaskFile) -> dict[str, Any]:
    """The same as a task of lm-eval, its questions in memory. Fields are named, no templates: texts stay as they are.

    The harness takes a few-shot example from the same file, never the question itself.
    """
    texts, delimiter = _texts(file)
    common = {
        "task": file.name,
        "test_split": SPLIT,
        "fewshot_split": SPLIT,
        "target_delimiter": delimiter,
        "doc_to_text": "text",
    }
    if file.kind == "choices":
        rows = [{"text": text, **row} for text, row in zip(texts, file.rows, strict=True)]
        return {
            **common,
            **_in_memory([{key: row[key] for key in ("text", "choices", "gold")} for row in rows]),
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        }
    if file.kind == "beginnings":
        return {
            **common,
            **_in_memory(file.rows),
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
            "metric_list": [_mean("acc")],
        }
    if file.kind == "continuation":
        docs = [
            {"text": text, "target": delimiter + row["continuation"]}
            for text, row in zip(texts, file.rows, strict=True)
        ]
        return {
            **common,
            **_in_memory(docs),
            "target_delimiter": "",  # stands in the target, to which the harness adds none
            "output_type": "loglikelihood",
            "doc_to_target": "target",
            "metric_list": [
                _mean("acc"),
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    docs = [
        {"text": text, "answers": row["answer"], "target": row["answer"][0]}
        for text, row in zip(texts, file.rows, strict=True)
    ]
    longest = max(len(answer.encode()) for row in file.rows for answer in row["answer"])  # a token is a byte or more
    room = LONGEST_ANSWER if "pattern" in file.extra else min(LONGEST_ANSWER, longest + 8)
    return {
        **common,
        **_in_memory(docs),
        "output_type": "generate_until",
        "doc_to_target": "target",
        "generation_kwargs": {"until": [file.extra.get("until", "\n")], "do_sample": False, "max_gen_toks": room},
        "process_results": exact_match(file.extra.get("pattern")),
        "metadata": {"pattern": file.extra.get("pattern")},  # a function does not tell
        "metric_list": [_mean("exact_match")],
    }


def answers_of(file: TaskFile) -> list[int]:
    """For each question, how many answers the harness asks of a model: one for every choice."""
    several: dict[Kind, str] = {"choices": "choices", "beginnings": "context_options"}
    field = several.get(file.kind)
    return [len(row[field]) if field is not None else 1 for row in file.rows]


def exact_match(pattern: str | None) -> Callable[[dict[str, Any], list[str]], dict[str, float]]:
    """How a written answer is judged: what ``pattern`` finds last in it, or all of it, without white space around."""

    def judged(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        said = results[0]
        if pattern is not None:
            found = list(re.finditer(pattern, said))
            said = (found[-1][1] if found[-1].re.groups else found[-1][0]) or "" if found else ""
        return {"exact_match": float(said.strip() in [answer.strip() for answer in doc["answers"]])}

    return judged


def _texts(file: TaskFile) -> tuple[list[str], str]:
    """What each question begins with, and what is put between it and what follows."""
    texts = [row.get("query") or row.get("context") or "" for row in file.rows]
    if file.kind == "beginnings":
        texts = [text for row in file.rows for text in row["context_options"]]
    if file.kind in ("choices", "written") and all(
        text.startswith("Question:") and "Answer:" not in text for text in texts
    ):
        texts = [f"{text.rstrip()}\nAnswer:" for text in texts]
    return texts, "" if all(text[-1].isspace() for text in texts) else " "


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _in_memory(docs: list[dict[str, Any]]) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {SPLIT: Dataset.from_list(docs)}

    return {"custom_dataset": dataset}
