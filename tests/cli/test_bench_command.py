"""``compressor bench`` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import Command

from compressor.report.numbers import significant

pytestmark = pytest.mark.usefixtures("little_memory")
SHORT = ["--context", "0,8,16", "--batch", "1,2", "--tokens", "2", "--device", "cpu"]


def test_tables_file_and_page(command: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe of 80 columns: no colour; the same numbers in the file; a page that needs nothing else."""
    monkeypatch.setenv("COLUMNS", "80")
    words: list[Any] = [llama, "--base", llama, *SHORT, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.html"]
    result = command("bench", *words)
    assert result.code == 0 and not result.err
    lines = result.out.splitlines()
    short = [line for line in lines if not line.startswith("  ! ") and str(tmp_path) not in line]  # paths stay whole
    assert max(len(line) for line in short) <= 80 and "\x1b" not in result.out
    content = json.loads((tmp_path / "b.json").read_text())
    assert [len(way["decode"]) for way in content["ways"]] == [6] * len(content["ways"])
    assert lines[1].startswith("no layers that the kernels (") and "packed layers by" not in result.out
    rows = [line.split() for line in lines if line.strip().startswith("base in bf")]
    shown = significant(content["ways"][2]["decode"][0]["tokens_per_second"], 3)
    assert any(shown in row for row in rows), rows
    page = (tmp_path / "b.html").read_text()
    assert page.count("<svg") == 4 and "<script" not in page and "http" not in page.split("</head>")[1]
    for way in content["ways"]:
        assert way["name"] in page


def test_json_alone_on_standard_output(command: Command, llama: Path) -> None:
    result = command("bench", llama, *SHORT, "--json", "-")
    assert result.code == 0 and json.loads(result.out)["ways"][0]["name"] == "model"
    assert command("bench", llama, *SHORT, "-q").out == ""


def test_one_line_for_a_mistake(command: Command, llama: Path, tmp_path: Path) -> None:
    for words in (
        [tmp_path / "absent"],
        [llama, "--context", "0,many"],
        [llama, "--context", "63"],
        [llama, "--batch", "0"],
        [llama, "--json", tmp_path],
        [llama, "--json", tmp_path / "no" / "b.json"],
        [llama, "--plot", tmp_path / "b.png"],
        [llama, "--threads", "0"],
    ):
        result = command("bench", *words)
        assert result.code == 2 and not result.out, words
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err


def test_a_large_name_stays_inside_the_lines(command: Command, tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.random_model("gpt2"), tmp_path / "[bold]g")
    assert "[bold]g: GPT2LMHeadModel" in command("bench", folder, *SHORT).out
