"""Tasks of a recipe: the same answers as by ``evaluate --tasks``, in the report of the run that made the model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from killing import Killed
from questions import harness_task, sequences, stories, write

from compressor.errors import UserError
from compressor.report.files import read_report
from compressor.report.schema import Report
from compressor.run import tasks
from compressor.run.progress import quiet
from compressor.run.recipe import make_recipe
from compressor.run.session import Options
from compressor.run.stream import compress, foresee
from compressor.run.task_names import sort_tasks
from compressor.run.whole import Found

pytestmark = pytest.mark.usefixtures("harness")

RTN = ("--method", "rtn", "--bits", 3, "--group", 32, "--asymmetric")


def recipe(**evaluation: Any) -> Any:
    stages = [{"quantize": {"method": "rtn", "bits": 3, "group": 32, "asymmetric": True}}]
    return make_recipe(
        {"stages": stages, "verify": False, "evaluation": {"texts": ["none"], "samples": 0, **evaluation}}
    )


def test_a_plan_says_how_many_answers_the_harness_will_ask_for(command: Command, tmp_path: Path) -> None:
    from compressor.run.task_harness import load_questions

    begin = {"context_options": ["a b", "c d", "e f"], "continuation": "g", "gold": 1}
    files = [
        write(tmp_path / "choices.jsonl", sequences(5)),
        write(tmp_path / "begin.jsonl", [begin] * 4),
        write(tmp_path / "go.jsonl", [{"context": "a", "continuation": "b"}] * 2),
        write(tmp_path / "sums.jsonl", stories(6)),
    ]
    words = ",".join(map(str, files))
    planned = command("prune", "embedded", "--eval-tasks", words, "--eval-task-limit", 4, "--dry-run", "--json")
    told = [(task["name"], task["requests"]) for task in json.loads(planned.out)["tasks"]]
    asked = load_questions(sort_tasks([words]), None, 4, quiet())
    assert told == [(name, each.requests) for each in asked for name in each.tasks]
    assert told == [("choices", 16), ("begin", 12), ("go", 2), ("sums", 4)]
    shown = command("prune", "embedded", "--eval-tasks", f"{files[0]},hellaswag", "--eval-task-limit", 4, "--dry-run")
    assert re.search(r"choices +choices\.jsonl: choices +0 +4/5 +16\n", shown.out), shown.out
    assert re.search(r"hellaswag +lm-eval's own, by name +its own +first 4 +\S\n", shown.out), shown.out
    assert "\\x" not in shown.out and "result and source at the end (lm-eval" in shown.out


def test_a_verb_with_tasks(command: Command, tmp_path: Path) -> None:
    file, output = write(tmp_path / "next.jsonl", sequences(12)), tmp_path / "out"
    asked = ("--eval-tasks", file, "--eval-task-limit", 10, "--eval-task-shots", 1)
    done = command("quantize", "embedded", "-o", output, *RTN, "--eval", "none", "--samples", 0, *asked)
    assert done.code == 0 and "\x1b" not in done.out + done.err, done.err
    assert "10/12" in done.out and "base" in done.out
    report = read_report(output)
    assert str(tmp_path) not in report.tool.command and "--eval-tasks next.jsonl" in report.tool.command
    assert "answering tasks" in [timing.what for timing in report.timings]
    words = ("--tasks", file, "--limit", 10, "--num-fewshot", 1, "--json")
    again = json.loads(command("evaluate", output, "--against", "embedded", *words).out)["tasks"]
    assert [result.model_dump(mode="json") for result in report.tasks] == again and len(again) == 2
    assert "<td>acc_norm" in (output / "report.html").read_text(encoding="utf-8")
    assert r"| next | acc\_norm | 1 |" in (output / "README.md").read_text(encoding="utf-8")


def test_answers_are_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the base answers its second task: only that one is left, and a task that was added."""
    files = [str(write(tmp_path / f"{name}.jsonl", sequences(count))) for name, count in (("a", 4), ("b", 5), ("c", 6))]
    whole = compress(recipe(tasks=files[:2]), "embedded", Options(tmp_path / "whole")).tasks

    saved: list[str] = []
    real = tasks.Kept

    def fatal(answers: dict[str, Any], save: Any) -> tasks.Kept:
        def count() -> None:
            save()
            saved.append(list(answers)[-1])
            if len(saved) == 3:
                raise Killed

        return real(answers, count)

    monkeypatch.setattr("compressor.run.final_tasks.Kept", fatal)
    with pytest.raises(Killed):
        compress(recipe(tasks=files[:2]), "embedded", Options(tmp_path / "out"))
    assert [key.split()[0] for key in saved] == ["model", "model", "base"] and not (tmp_path / "out").exists()
    monkeypatch.undo()
    shutil.copytree(tmp_path / "out.partial", tmp_path / "more.partial")

    loads: list[str] = []
    load = Found.load

    def counted(found: Found, **words: Any) -> Any:
        loads.append(found.name)
        return load(found, **words)

    monkeypatch.setattr(Found, "load", counted)
    assert compress(recipe(tasks=files[:2]), "embedded", Options(tmp_path / "out")).tasks == whole
    assert loads == ["embedded"]
    more: Report = compress(recipe(tasks=files), "embedded", Options(tmp_path / "more"))
    assert more.tasks[: len(whole)] == whole and more.tasks[-1].task == "c" and loads[1:] == ["more", "embedded"]


def test_what_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "next.jsonl", sequences(3))
    broken, long = tmp_path / "broken.yaml", tmp_path / "long.yaml"
    broken.write_text(harness_task("broken", tmp_path / "none.json"), encoding="utf-8")
    written = "output_type: generate_until\ngeneration_kwargs: {until: [x], max_gen_toks: 5000}"
    text = harness_task("long", data).replace("output_type: multiple_choice", written).replace("acc,", "exact_match,")
    long.write_text(text, encoding="utf-8")
    wide = write(tmp_path / "wide.jsonl", [{"query": "a", "choices": ["b", "count by 5: 20 " * 200], "gold": 0}])
    refused = {
        tmp_path / "none.jsonl": "no task file",
        broken: "cannot load task 'broken.yaml'",
        long: "answers of 5000 tokens leave no room",
        wide: "longer than the context of embedded",
    }
    for file, complaint in refused.items():
        with pytest.raises(UserError, match=complaint):
            compress(recipe(tasks=[str(file)]), "embedded", Options(tmp_path / "out"))
    with pytest.raises(UserError, match="none was named"):
        recipe(task_limit=3)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install "compressor\[tasks\]"'):
        foresee(recipe(tasks=[str(data)]), "embedded")  # so that plan says it, too
    assert [path.name for path in tmp_path.glob("out*")] == []
