"""Files of questions: what they say, what is asked of the model, and lines that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import UserError
from compressor.run import task_names, task_plan
from compressor.run.settings import EvaluationSettings
from compressor.run.task_files import exact_match, read_task_file, task_config
from compressor.run.task_names import sort_tasks
from compressor.run.task_plan import foreseen_tasks


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def docs(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = task_config(read_task_file(path))
    return config, list(config["custom_dataset"]()["test"])


def test_each_kind(tmp_path: Path) -> None:
    choice = {"query": "Question: who?\n", "choices": ["a", "b"], "gold": 1}
    config, rows = docs(write(tmp_path / "who.jsonl", choice, "", choice))
    assert (config["task"], config["output_type"], len(rows)) == ("who", "multiple_choice", 2)
    assert rows[0] == {"text": "Question: who?\nAnswer:", "choices": ["a", "b"], "gold": 1}
    assert config["target_delimiter"] == " "
    config, rows = docs(write(tmp_path / "lines.jsonl", {"query": "It was.\n", "choices": ["a", "b"], "gold": 0}))
    assert rows[0]["text"] == "It was.\n" and config["target_delimiter"] == ""
    begin = {"context_options": ["he", "she"], "continuation": "went", "gold": 0}
    config, rows = docs(write(tmp_path / "begin.jsonl", begin))
    assert rows == [begin] and config["target_delimiter"] == " "
    config, rows = docs(write(tmp_path / "go.jsonl", {"context": "I {{do}} not", "continuation": "care", "more": 1}))
    assert rows == [{"text": "I {{do}} not", "target": " care"}] and config["output_type"] == "loglikelihood"
    config, rows = docs(write(tmp_path / "sum.jsonl", {"query": "1 + 1 =", "answer": ["2", "two"]}))
    assert rows == [{"text": "1 + 1 =", "answers": ["2", "two"], "target": "2"}]
    assert config["generation_kwargs"] == {"until": ["\n"], "do_sample": False, "max_gen_toks": 11}


def test_what_was_written_is_judged() -> None:
    doc = {"answers": ["24", "two dozen"]}
    whole, found, last = exact_match(None), exact_match(r"answer is (\w+)"), exact_match(r"\d+")
    assert [whole(doc, [said])["exact_match"] for said in (" 24 ", "two dozen", "24.", "")] == [1, 1, 0, 0]
    assert [found(doc, [said])["exact_match"] for said in ("The answer is 24.", "24", "answer is 2")] == [1, 0, 0]
    assert [last(doc, [said])["exact_match"] for said in ("1 + 23 = 24", "24 - 1 = 23")] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["{"], "line 1: not JSON"),
        ([[1]], "line 1: has the fields of no kind"),
        ([{"query": "a", "choices": ["b"]}], "line 1: has the fields of no kind"),
        ([{"query": "a", "choices": ["b"], "gold": 1}], "'gold' is 1, expected 0 to 0"),
        ([{"query": "a", "choices": ["b"], "gold": True}], "'gold' is True"),
        ([{"query": "a", "choices": [], "gold": 0}], "'gold' is 0"),
        ([{"query": "a", "choices": "bc", "gold": 0}], "no list of texts"),
        ([{"query": " ", "answer": "b"}], "'query' is no text"),
        ([{"query": "a", "answer": []}], "'answer' is neither"),
        ([{"query": "a", "answer": "b", "pattern": "("}], "no regular expression"),
        ([{"context": "a", "continuation": "b", "until": "c"}], "'until' only stands beside 'answer'"),
        ([{"query": "a", "answer": "b"}, {"context": "a", "continuation": "b"}], "line 2 is of another kind"),
        ([""], "holds no question"),
    ],
)
def test_a_line_that_is_refused(lines: list[Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint.replace("(", r"\(")):
        read_task_file(write(tmp_path / "bad.jsonl", *lines))


def test_words_are_sorted_out(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"query": "1 + 1 =", "answer": "2"})
    task = write(tmp_path / "t.yaml", "task: t")
    asked = sort_tasks([f"{file}, arc_easy", str(tmp_path), str(task)])
    assert [file.name for file in asked.files] == ["q"]
    assert (asked.names, asked.folders, asked.yaml_files) == (["arc_easy"], [tmp_path], [task])
    for words in ([","], ["no/where"], ["none.yaml"]):
        with pytest.raises(UserError):
            sort_tasks(words)


def test_what_a_plan_knows_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness: only that it is there is asked."""
    monkeypatch.setattr(task_names, "find_spec", lambda _: object())
    monkeypatch.setattr(task_plan, "version", lambda _: "0.4")
    rows = [{"query": "a", "choices": ["b"] * count, "gold": 0} for count in (2, 3, 4)]
    file = write(tmp_path / "several.jsonl", *rows)
    written = write(tmp_path / "sums.jsonl", {"query": "a", "answer": "b"})
    words = (str(file), str(tmp_path), "hellaswag", str(written))
    told = foreseen_tasks(EvaluationSettings(tasks=words, task_limit=2))
    assert [(t.name, t.shots, t.limit, t.total, t.requests) for t in told] == [
        ("several", 0, 2, 3, 5),
        ("sums", 0, 2, 1, 1),
        (f"{tmp_path.name}/", None, 2, None, None),
        ("hellaswag", None, 2, None, None),
    ]
    (one,) = foreseen_tasks(EvaluationSettings(tasks=(str(file),), task_shots=1))
    assert (one.shots, one.requests) == (1, 9)
    assert foreseen_tasks(EvaluationSettings()) == ()
