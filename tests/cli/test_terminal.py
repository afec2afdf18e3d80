"""What a person, a pipe and a log file see: nothing cut, nothing drawn where nothing can be, whatever the width."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from rich.console import Console
from rich.progress import Progress

from compressor.cli.app import library_defaults
from compressor.cli.tables import NARROW, Sheet, add_row, new_table
from compressor.report.numbers import ABSENT
from compressor.run.progress import SILENT, Bar, Lines, TimeLeft, Voice, without_bars

SHORT = ["--nsamples", "4", "--seqlen", "16", "--eval-windows", "2", "--no-verify"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model."""
    output = tmp_path_factory.mktemp("models") / "a-name-that-is-rather-long"
    command = [sys.executable, "-m", "compressor.cli.app", "prune", "embedded", "-o", str(output), *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # a short run is silent in a log
    assert "\x1b" not in done.stdout and str(output / "report.html") in done.stdout  # a path in one piece
    return output


VERBS: dict[str, list[Any]] = {
    "prune": ["embedded", "--dry-run", *SHORT],
    "linearize": ["embedded", "--dry-run"],
    "evaluate": ["FOLDER", "--against", "embedded", "--windows", "2", "--seqlen", "32"],
    "compare": ["FOLDER", "FOLDER"],
    "explain": ["FOLDER"],
    "generate": ["FOLDER", "--prompt", "Once", "--tokens", "2"],
    "bench": ["FOLDER", "--base", "embedded", "--context", "0,8", "--tokens", "2"],
    "doctor": [],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("width", [80, 60])
def test_a_pipe_gets_plain_text(
    verb: str, width: int, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No control codes, no progress, no cell cut short; tables as wide as COLUMNS says, sentences in one piece."""
    monkeypatch.setenv("COLUMNS", str(width))
    result = command(verb, *(folder if word == "FOLDER" else word for word in VERBS[verb]))
    assert result.code == 0 and result.err == "", result.err
    assert not re.search(r"[\x1b\r\x08…]", result.out)
    lines = result.out.splitlines()
    assert lines and all(line == line.rstrip() for line in lines if verb != "generate")
    for place, line in enumerate(lines):  # a rule is as wide as its table
        if line.startswith("──"):
            assert len(line) <= width
            below = lines[place + 1 : lines.index("", place)]
            assert all(len(row) <= len(line) for row in below)


def test_a_pipe_of_unknown_width_gets_tables_that_can_be_read(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 120 characters at most, with the whole label of a baseline that is long."""
    monkeypatch.delenv("COLUMNS", raising=False)
    content = json.loads((folder / "report.json").read_text())
    label = "2-bit round-to-nearest, group row (larger than the result: fewer bits do not exist)"
    for text in content["evaluation"]:
        text["rows"][-1]["label"] = label
    (tmp_path / "report.json").write_text(json.dumps(content))
    result = command("compare", folder, tmp_path / "report.json")
    assert result.code == 0 and max(map(len, result.out.splitlines())) <= 120
    words = result.out[result.out.index("perplexity") :].split()
    assert [word for word in words if word in label.split()][-len(label.split()) :] == label.split()


def test_a_terminal_of_eighty_columns(folder: Path) -> None:
    """The same through a pseudo-terminal: nothing goes over its edge, and without colour where that was asked for."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "compressor.cli.app", "explain", str(folder)]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    text = shown.decode()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text) and "…" not in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r", "")
    assert max(map(len, plain.splitlines())) <= 80 and "model.layers.{0..2}" in plain


def table() -> Sheet:
    sheet = new_table("Tensors", ("name", "format"), ("bits per weight", "bytes", "same first choice"))
    add_row(sheet, "model.layers.{0..31}.self_attn.q_proj", "trit-planes", "3.125", "1.23\u00a0MB", "99.5\u00a0%")
    sheet.add_section()
    add_row(sheet, "Einszweidreivierfünfsechssiebenachtneunzehn", "bf16", "16.0", "812\u00a0B", "")
    add_row(sheet, "模型", "名字很长的格式", "2", "3\u00a0kB", ABSENT)
    return sheet


@pytest.mark.parametrize("width", [20, 33, 40, 47, 55, 60, 66, 72, 80, 100, 200])
def test_a_table_loses_nothing_at_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    sheet = table()
    console.print(sheet)
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(console.measure(line).maximum <= width for line in shown.splitlines())
    letters = sorted(re.sub(r"[\s─]", "", shown))
    for row in sheet.rows:
        for letter in re.sub(r"\s", "", "".join(row or ())):
            letters.remove(letter)  # ValueError: it is missing
    if "──" in shown:
        rules = [line for line in shown.splitlines() if line.startswith("──")]
        assert len(rules) == 2 and len(rules[0]) <= width
        numbers = [line for line in shown.splitlines() if line.endswith(("99.5\u00a0%", ABSENT))]
        assert len(numbers) == 2 and all(console.measure(line).maximum == len(rules[0]) for line in numbers)
    else:
        assert width < 2 * NARROW + 30


def test_words_that_would_steer_a_terminal_are_spelled_out() -> None:
    sheet = new_table("", ("name",), ("count",))
    add_row(sheet, "a\x1b[31mb\nc", "1")
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(sheet)
    assert "a\\x1b[31mb\\x0ac" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_gets_a_line_now_and_then() -> None:
    """Nothing in the first half minute; then less and less often; the time left from the time spent."""
    log = io.StringIO()
    voice = Voice(Console(file=log, width=80))
    now = [0.0]
    ticker = Lines(voice, 1000, 100, clock=lambda: now[0])
    ticker.now("block 7")
    for _ in range(800):
        now[0] += 2.0
        ticker.advance()
    lines = log.getvalue().splitlines()
    assert lines[0] == "block 7: 115 of 1,000 after 30.0\u00a0s, about 29\u00a0min 30\u00a0s left"
    assert 1600 / 160 < len(lines) < 1600 / SILENT and not re.search(r"[\x1b\r]", log.getvalue())
    silent = Voice(Console(file=log, width=80), -1)
    before = log.getvalue()
    with silent.progress(3) as quiet:
        quiet.advance()
    assert log.getvalue() == before


@pytest.mark.parametrize("width", [50, 80, 160])
def test_a_bar_keeps_its_numbers(width: int) -> None:
    """Whatever the step is called: how far it is, and the time left, are told whole; at the end nothing stays."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with Voice(console).progress(90_000) as ticker:
        assert isinstance(ticker, Bar)
        ticker.now("block 1 and 3 more: relative error 0.000223, 2172 tokens/s")
        ticker.advance(30_600)
        ticker.bar.refresh()
        ticker.reach(90_000)
    drawn = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in re.split(r"[\r\n]", screen.getvalue())]
    assert all(len(line) <= width for line in drawn)
    assert any(" 34 % 0:00:00 left block 1" in line for line in drawn), drawn
    assert any(" 100 % 0:00:00 left" in line for line in drawn)
    assert not re.search(r"[0-9]…", "".join(line.partition(" left")[0] for line in drawn))


def test_time_left_where_steps_take_minutes() -> None:
    """From the first step on, and counting down within a step."""
    now = [0.0]
    column = TimeLeft()
    bar = Progress(column, console=Console(file=io.StringIO()), get_time=lambda: now[0], auto_refresh=False)
    task = bar.add_task("", total=5, completed=1, first=1)  # the first block was done before a run was resumed
    shown = []
    for second in (5, 600, 660, 1800):
        now[0] = float(second)
        if second == 600:
            bar.advance(task)
        shown.append(column.render(bar.tasks[0]).plain)
    assert shown == ["0:00:05 so far", "0:30:00 left", "0:29:00 left", "0:10:00 left"]


def test_what_takes_time_is_named() -> None:
    """On a terminal; a log is told with ``-v`` only."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with Voice(console).meanwhile("proving") as say:
        say("proving: samples")
    assert "proving 0:00:00" in screen.getvalue() and "proving: samples 0:00:00" in screen.getvalue()
    for verbosity, said in ((0, ""), (1, "proving\nproving: samples\n")):
        log = io.StringIO()
        with Voice(Console(file=log, width=80), verbosity).meanwhile("proving") as say:
            say("proving: samples")
        assert log.getvalue() == said


def test_bars_of_libraries_are_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    with without_bars():
        assert list(tqdm([1, 2])) == [1, 2]
        assert list(tqdm([1, 2], disable=False)) == [1, 2]  # as compressed-tensors does, whatever TQDM_DISABLE says
    assert capsys.readouterr().err == ""
    list(tqdm([1, 2]))
    assert "2/2" in capsys.readouterr().err


def test_a_terminal_without_arrows(folder: Path) -> None:
    """What it cannot show is replaced, and is no reason to stop."""
    command = [sys.executable, "-m", "compressor.cli.app", "explain", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and b"----" in done.stdout and done.stdout.isascii()


def test_what_libraries_are_told() -> None:
    """Threads wait without spinning, but where the original is measured; bars are drawn on terminals only."""
    seen = library_defaults(["prune", "embedded"], True)
    assert seen == {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
    assert "OMP_WAIT_POLICY" not in library_defaults(["bench", "pruned"], True)
    logged = library_defaults([], False)
    assert {name for name in logged if "BARS" in name} == {
        "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS",
    }  # fmt: skip
