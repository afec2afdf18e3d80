"""Tasks through EleutherAI's lm-eval, against a scorer of a few lines that is obviously right."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from questions import harness_task, sequences, stories, write
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.engine.checkpoint import resolve_model
from compressor.errors import UserError
from compressor.report.files import read_report, write_report
from compressor.report.schema_use import TaskResult
from compressor.run.export_dense import export_dense
from compressor.run.progress import Voice, quiet
from compressor.run.recipe import make_recipe
from compressor.run.session import Options
from compressor.run.stream import compress
from compressor.run.task_names import sort_tasks
from compressor.run.tasks import run_tasks

pytestmark = pytest.mark.usefixtures("harness")


ANSWERED = {
    "task": "next", "metric": "acc", "value": 0.5, "samples": 6, "output_type": "multiple_choice", "harness": "0.4",
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized; with a report."""
    stages = [{"quantize": {"method": "rtn", "bits": 3, "group": 32, "asymmetric": True}}]
    output = tmp_path_factory.mktemp("packed") / "out"
    compress(make_recipe({"stages": stages, "evaluation": {"windows": 2}}), "embedded", Options(output))
    return output


class Plain:
    """A model by transformers alone."""

    def __init__(self, name: str | Path) -> None:
        folder = resolve_model(str(name))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def says(self, text: str, more: str) -> tuple[float, bool]:
        """Log-probability of ``more`` after ``text``, and whether each of its tokens is the likeliest."""
        whole: Tensor = self.tokenizer(text + more, return_tensors="pt")["input_ids"]
        first = len(self.tokenizer(text)["input_ids"])
        logs = self.model(whole).logits[0, :-1].float().log_softmax(-1)
        told = whole[0, 1:]
        chosen = logs.gather(1, told[:, None])[first - 1 :, 0]
        return float(chosen.sum()), bool((logs.argmax(-1) == told)[first - 1 :].all())

    @torch.no_grad()
    def writes(self, text: str, tokens: int) -> str:
        """Greedily, one row, no cache."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(tokens):
            following = self.model(ids, use_cache=False).logits[:, -1].argmax(-1)
            if int(following) == self.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[:, None]], dim=1)
            if "\n" in self.tokenizer.decode(ids[0, start:]):
                break
        return str(self.tokenizer.decode(ids[0, start:])).split("\n")[0]


def find(results: list[TaskResult], metric: str) -> TaskResult:
    return next(result for result in results if result.metric == metric)


@pytest.mark.parametrize("which", ["embedded", "packed"])
def test_choices_are_scored_as_by_hand(which: str, packed: Path, tmp_path: Path) -> None:
    model = str(packed) if which == "packed" else which
    rows = sequences(24)
    results = run_tasks(model, [str(write(tmp_path / "next.jsonl", rows))], batch=5)
    plain = Plain(model)
    right, right_norm = [], []
    for row in rows:
        logs = [plain.says(row["query"], " " + choice)[0] for choice in row["choices"]]
        by_length = [log / len(choice) for log, choice in zip(logs, row["choices"], strict=True)]
        right.append(logs.index(max(logs)) == row["gold"])
        right_norm.append(by_length.index(max(by_length)) == row["gold"])
    acc = find(results, "acc")
    assert acc.value == pytest.approx(sum(right) / len(rows))
    assert find(results, "acc_norm").value == pytest.approx(sum(right_norm) / len(rows))
    assert (acc.chance, acc.samples, acc.total, acc.output_type) == (0.25, 24, 24, "multiple_choice")
    assert acc.corrected == pytest.approx((acc.value - 0.25) / 0.75)
    from lm_eval.api.metrics import mean_stderr

    assert acc.stderr == pytest.approx(mean_stderr([float(each) for each in right]))
    if which == "embedded":
        assert acc.value > 0.6 and acc.verdict == ""


def test_what_is_written_is_judged_as_by_hand(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = stories(8)
    file = write(tmp_path / "sums.jsonl", rows)
    (result,) = run_tasks("embedded", [str(file)], batch=3, against=str(packed))
    assert "generation" not in capfd.readouterr().err  # the model's own settings are not those of the task
    for value, model in ((result.value, "embedded"), (result.base, packed)):
        plain, right = Plain(model), []
        for row in rows:
            found = re.findall(r"The answer is (\d+)", plain.writes(row["query"] + "Answer:", 60))
            right.append(bool(found) and found[-1] == row["answer"])
        assert value == pytest.approx(sum(right) / len(rows))
    assert result.value > 0  # it can do some of them
    assert (result.metric, result.output_type, result.chance) == ("exact_match", "generate_until", None)


def test_continuations_and_beginnings(tmp_path: Path) -> None:
    """One answer that must be the likeliest; and beginnings, judged by how they go on."""
    knows = [
        {"context": "count by 5: 20 25 30 35", "continuation": "40"},
        {"context": "double: 4 8", "continuation": "9"},
    ]
    begin = [
        {"context_options": ["count by 5: 20 25 30", "count by 7: 20 27 34"], "continuation": "41 48", "gold": 1},
        {"context_options": ["double: 4 8 16", "count by 7: 20 27 34"], "continuation": "32 64", "gold": 0},
    ]
    files = [str(write(tmp_path / "go.jsonl", knows)), str(write(tmp_path / "begin.jsonl", begin))]
    results = run_tasks("embedded", [",".join(files)])
    plain = Plain("embedded")
    said = [plain.says(row["context"], " " + row["continuation"]) for row in knows]
    go = {result.metric: result for result in results if result.task == "go"}
    assert go["acc"].value == sum(greedy for _, greedy in said) / 2 == 0.5
    assert go["perplexity"].value == pytest.approx(
        float(torch.tensor([-log for log, _ in said]).mean().exp()), rel=1e-3
    )
    assert go["acc"].chance is None and go["perplexity"].corrected is None
    (begun,) = [result for result in results if result.task == "begin"]
    assert begun.value == 1.0 and begun.chance == 0.5


def test_a_task_file_of_the_harness(tmp_path: Path) -> None:
    """A YAML task over local data: alone, and as all that lies in a folder; the same numbers as by our file."""
    rows = sequences(10)
    data = write(tmp_path / "data.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "next.yaml").write_text(harness_task("next_number", data), encoding="utf-8")
    ((alone,), (together,)) = (run_tasks("embedded", [str(place)]) for place in (folder / "next.yaml", folder))
    assert alone == together and alone.task == "next_number"
    assert alone.value == find(run_tasks("embedded", [str(data)]), "acc").value


def test_a_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    """Not of where functions of the task lie in memory; what is asked and how it is scored is in it."""
    from compressor.run.task_harness import load_questions

    data, file = write(tmp_path / "data.jsonl", sequences(6)), tmp_path / "next.yaml"
    (tmp_path / "helpers.py").write_text("def kept(docs):\n    return docs\n", encoding="utf-8")
    text = harness_task("next_number", data) + "process_docs: !function helpers.kept\n"

    def digest(text: str, limit: int | None = None) -> str:
        file.write_text(text, encoding="utf-8")
        (found,) = load_questions(sort_tasks([str(file)]), None, limit, quiet())
        return found.digest

    first = digest(text)
    assert first == digest(text)
    assert len({first, digest(text, 3), digest(text.replace("acc,", "acc_norm,"))}) == 3


def test_examples_and_limit(tmp_path: Path) -> None:
    file = str(write(tmp_path / "next.jsonl", sequences(12)))
    state = torch.get_rng_state(), random.getstate()
    plain, shown = (find(run_tasks("embedded", [file], limit=5, shots=shots), "acc") for shots in (None, 2))
    assert (plain.samples, plain.total, plain.shots) == (5, 12, 0)
    assert (shown.samples, shown.shots) == (5, 2) and shown.tokens_sha256 != plain.tokens_sha256
    assert shown == find(run_tasks("embedded", [file], limit=5, shots=2), "acc")  # the same examples every time
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    both = find(run_tasks("embedded", [file], limit=5, shots=2, against="embedded"), "acc")
    assert both.tokens_sha256 == shown.tokens_sha256 and both.base == both.value == shown.value


def counting(tmp_path: Path, aggregate: str) -> Path:
    """A folder with a group of two tasks, a group around it with one more, and a task that is in none."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, count in (("few", 4), ("many", 12), ("more", 3), ("alone", 2)):
        rows = sequences(count)
        for row in rows[::3] if name == "many" else []:  # else the model knows it all
            row["gold"] = (row["gold"] + 1) % 4
        data = write(tmp_path / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(harness_task(name, data), encoding="utf-8")
    text = f"aggregate_metric_list:\n  - {aggregate}\n"
    (folder / "inner.yaml").write_text(f"group: inner\ntask: [few, many]\n{text}", encoding="utf-8")
    (folder / "outer.yaml").write_text(f"group: outer\ntask: [inner, more]\n{text}", encoding="utf-8")
    return folder


def test_a_group_is_its_questions_together(tmp_path: Path, packed: Path) -> None:
    """By questions, also against the base; the groups stand before their tasks, and their tasks are asked once."""
    folder = counting(tmp_path, "{metric: acc, weight_by_size: true}")
    results = run_tasks(str(packed), [str(folder)], against="embedded")
    assert [result.task for result in results] == ["outer", "inner", "few", "many", "more", "alone"]
    outer, inner, few, many, more, alone = results
    assert (inner.members, outer.members, few.members) == (["few", "many"], ["few", "many", "more"], [])
    assert (inner.samples, inner.total, outer.samples, inner.shots, inner.chance) == (16, 16, 19, 0, 0.25)
    rights = 4 * few.value + 12 * many.value
    assert inner.value == pytest.approx(rights / 16) and outer.value == pytest.approx((rights + 3 * more.value) / 19)
    assert 0 < inner.value < 1 and inner.stderr == pytest.approx((inner.value * (1 - inner.value) / 15) ** 0.5)
    assert inner.base is not None and few.base is not None and many.base is not None
    assert inner.base == pytest.approx((4 * few.base + 12 * many.base) / 16)
    assert inner.p is not None and inner.verdict and alone.task not in outer.members
    (named, *_) = run_tasks(str(packed), [str(folder / "inner.yaml")])  # one file, whose tasks lie beside it
    assert (named.task, named.value, named.tokens_sha256) == ("inner", inner.value, inner.tokens_sha256)


def test_a_group_whose_tasks_count_alike(tmp_path: Path) -> None:
    """There is no set of questions whose mean it is: no chance, no error, and that is said."""
    folder = counting(tmp_path, "{metric: acc, weight_by_size: false}")
    outer, inner, few, many, *_ = run_tasks("embedded", [str(folder)], limit=7, against="embedded")
    assert inner.value == pytest.approx((few.value + many.value) / 2) != (4 * few.value + 7 * many.value) / 11
    assert inner.base == inner.value and (inner.chance, inner.stderr, inner.p) == (None, None, None)
    assert inner.verdict.startswith("its tasks count alike") and outer.members == ["few", "many", "more"]


def test_against_the_base_into_report_and_card(command: Command, packed: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "next.jsonl", sequences(40))
    report = read_report(packed)
    write_report(report, packed, source_card="---\nlicense: mit\nlanguage: [en]\n---\nA model.\n")
    asked = ("evaluate", packed, "--tasks", file, "--against", "embedded")
    shown = command(*asked, "--into-report")
    assert shown.code == 0, shown.err
    assert "\x1b" not in shown.out + shown.err and shown.err == ""
    assert "than the base" in shown.out or "no difference shown" in shown.out
    first = read_report(packed)
    assert {result.metric for result in first.tasks} == {"acc", "acc_norm"}
    acc = find(first.tasks, "acc")
    base = find(run_tasks("embedded", [str(file)]), "acc")
    assert acc.base == base.value and acc.tokens_sha256 == base.tokens_sha256
    assert first.model_copy(update={"tasks": []}) == report
    card = (packed / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "- en" in card
    again = json.loads(command(*asked, "--into-report", "--json", "--limit", 10).out)
    assert again["texts"] == [] and [row["samples"] for row in again["tasks"]] == [10, 10]
    assert [result.samples for result in read_report(packed).tasks] == [10, 10]  # replaced, not added
    (packed / "README.md").write_text(card + "By hand.\n", encoding="utf-8")
    edited = command(*asked, "--into-report")
    assert "README.md was edited by hand" in edited.err
    assert (packed / "README.md").read_text(encoding="utf-8").endswith("By hand.\n")


def test_into_report_and_card_of_an_export(command: Command, packed: Path, tmp_path: Path) -> None:
    """As of a packed folder; what was answered before the export is told apart, and goes when it is asked again."""
    report, before = read_report(packed), TaskResult.model_validate(ANSWERED)
    write_report(
        report.model_copy(update={"tasks": [before]}), packed, source_card="---\nlicense: mit\n---\nA model.\n"
    )
    plain = tmp_path / "plain"
    export_dense(str(packed), plain, verify=False)
    card = (plain / "README.md").read_text(encoding="utf-8")
    assert "| next, before the export | acc |" in card and "was measured on the folder it was made from.\n" in card
    file = write(tmp_path / "more.jsonl", sequences(6))
    assert command("evaluate", plain, "--tasks", file, "--into-report").err == ""
    first = (plain / "README.md").read_text(encoding="utf-8")
    assert "| next, before the export | acc |" in first and "| more | acc |" in first
    assert "the tasks that do not say “before the export” were answered by what lies here" in first
    kept = [line for line in first.splitlines() if line in card.splitlines()]
    assert "license: mit" in first and len(kept) > 0.9 * len(card.splitlines()), "all else is as it was"
    assert [(each.task, each.before_export) for each in read_report(plain).tasks if each.metric == "acc"] == [
        ("next", True),
        ("more", False),
    ]
    again = write(tmp_path / "next.jsonl", sequences(5))
    assert command("evaluate", plain, "--tasks", again, "--into-report").err == ""
    second = (plain / "README.md").read_text(encoding="utf-8")
    assert "| next | acc |" in second and "| next, before" not in second
    assert "; but the tasks were answered by what lies here." in second
    assert not (plain / "report.html").exists(), "an export has no page"
    (plain / "README.md").write_text(second + "By hand.\n", encoding="utf-8")
    assert "README.md was edited by hand" in command("evaluate", plain, "--tasks", file, "--into-report").err
    assert (plain / "README.md").read_text(encoding="utf-8") == second + "By hand.\n"
    write_report(report, packed)


def test_what_is_refused(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "next.jsonl", sequences(3))
    refused = {
        ("--limit", 3): "--tasks",
        ("--tasks", file, "--tasks", file): "asked for twice",
        ("--tasks", tmp_path / "none.jsonl"): "no task file",
        ("--tasks", tmp_path): "holds no task",
        ("--tasks", file, "--into-report"): "cannot read the report",
    }
    for words, complaint in refused.items():
        result = command("evaluate", "embedded", *words)
        assert result.code == 2 and complaint in result.err and len(result.err.splitlines()) == 1, result
    long = write(tmp_path / "long.jsonl", [{"query": "a", "choices": ["b", "count by 5: 20 " * 200], "gold": 0}])
    assert "longer than the context" in command("evaluate", "embedded", "--tasks", long).err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install "compressor\[tasks\]"'):
        run_tasks("embedded", [str(file)])


def test_questions_that_are_cut_are_told(command: Command, tmp_path: Path) -> None:
    rows = [{"query": "count by 5: 20 25 30 35 40 45\n" * 60 + "count by 5: 20", "choices": ["25", "26"], "gold": 0}]
    result = command("evaluate", "embedded", "--tasks", write(tmp_path / "long.jsonl", rows))
    assert result.code == 0 and "2 of the texts are longer than the context" in result.err.replace("\n", " ")


def test_what_is_fetched_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, there before the harness reaches for the hub; none where all questions are in files."""
    from compressor.run import task_harness

    log = io.StringIO()
    seen: list[str] = []

    class Reaching:
        """The harness's index, and a hub that is not there."""

        all_tasks = ("toy", "other")

        def __init__(self, **how: Any) -> None:
            """Knows two tasks."""

        def load(self, spec: list[Any]) -> Any:
            seen.append(log.getvalue())
            raise ConnectionError("no route")

    monkeypatch.setattr(task_harness, "TaskManager", Reaching)
    far, near = tmp_path / "far.yaml", tmp_path / "near.yaml"
    far.write_text("task: far\ndataset_path: org/name\n")
    near.write_text("task: near\ndataset_path: json\n")
    for words, names in (
        (["toy,other"], "toy, other"),
        ([str(far)], "far.yaml"),
        ([str(near), "toy"], "toy"),
        ([str(near)], ""),
    ):
        log.seek(0)
        log.truncate()
        with pytest.raises(UserError, match="which cannot be reached"):
            run_tasks("embedded", words, voice=Voice(Console(file=log, width=80)))
        told = f"reading the questions of {names}: what is not on this disk yet is fetched from the hub"
        assert seen.pop() == log.getvalue() == (f"{told}, which may take minutes\n" if names else "")


@pytest.mark.slow
def test_names_of_the_harness(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index of thousands of tasks takes ten seconds to read."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "did you mean 'hellaswag'" in command("evaluate", "embedded", "--tasks", "helaswag").err
