"""Every command and every Python block of the documentation is parsed, and run where it can be.

Blocks that cannot run here say so in the page, in the line before: ``<!-- not run: needs a hub -->``. What makes the
others cheap is in ``standing.py``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from command_line import Command
from doc_blocks import IN_LINE, MARK, PAGES, ROOT, Block, blocks_of, typed, words_of
from standing import Standing, output_of, small

from compressor.cli.app import app
from compressor.run.recipe import make_recipe

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LAUNCHERS = ("accelerate launch", "torchrun")
NOT_OURS = (
    "pip install",
    "sh scripts/",
    "make ",
    "python -m benchmarks",
    "python benchmarks/",
    "python scripts/",
    "mkdocs",
)
SLOW = {"docs/verbs/linearize.md", "docs/linearize.md"}
"""Pages that train."""


def flags_of(verb: str) -> set[str]:
    """Every flag of a verb, and of the commands below it."""
    command = typer.main.get_command(app)
    chosen = command.commands[verb]  # type: ignore[attr-defined]
    below = getattr(chosen, "commands", {}).values()
    return {flag for one in (chosen, *below) for p in one.params for flag in (*p.opts, *p.secondary_opts)}


VERBS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
ANY_FLAG = {flag for verb in VERBS for flag in flags_of(verb)} | {"--help", "--debug", "--version"}
FOREIGN = re.compile(
    r"\b(accelerate|multi_gpu|fsdp|use_fsdp|torchrun|pip|pytest|scripts/|benchmarks|llama|vllm|mkdocs|convert|gguf|lm_eval)"
)


def test_there_are_blocks_of_each_kind() -> None:
    assert {"console", "python", "yaml"} <= {block.kind for block in BLOCKS}
    assert sum(len(typed(block)) for block in BLOCKS) > 80


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_mark_stands_before_a_block(page: Path) -> None:
    marks = len(MARK.findall(page.read_text(encoding="utf-8")))
    assert marks == sum(block.reason is not None for block in blocks_of(page))
    assert all(block.reason for block in blocks_of(page) if block.reason is not None)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page: Path) -> None:
    """All verbs and flags exist, also where the command is not run, and those in the middle of a sentence."""
    text = page.read_text(encoding="utf-8")
    for block in blocks_of(page):
        for line in typed(block) if block.kind == "console" else []:
            words = words_of(line)
            if words is None:
                assert line.startswith(NOT_OURS) and block.reason, f"{line}: neither ours nor marked as not run"
                continue
            assert not line.startswith(LAUNCHERS) or block.reason
            parse(words)
    for words in (found.split()[1:] for found in IN_LINE.findall(text)):
        if words and words[0] in VERBS:
            missing = {word for word in words if word.startswith("--")} - flags_of(words[0]) - {"--help"}
            assert not missing, f"compressor {' '.join(words)}: no such flag"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "benchmarks.md"], ids=lambda page: page.name)
def test_flags_in_sentences_exist(page: Path) -> None:
    for found in re.findall(r"`([^`\n]*--[a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
        if not FOREIGN.search(found):
            missing = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", found)) - ANY_FLAG
            assert not missing, f"{found}: no such flag"


def parse(words: list[str]) -> None:
    """Let the parser read a command; it refuses unknown verbs, flags and values."""
    if words == ["--version"]:
        return  # says it while it is parsed
    command = typer.main.get_command(app)
    context = command.make_context("compressor", [*words], resilient_parsing=False)
    name, chosen, rest = command.resolve_command(context, [*words])  # type: ignore[attr-defined]
    made = chosen.make_context(name, rest, parent=context)
    below = getattr(chosen, "commands", None)
    if below:
        inner = [word for word in words[1:] if word in below]
        assert inner or len(words) == 1, f"compressor {' '.join(words)}: no such command"
    assert made is not None


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for page, name in zip(PAGES, NAMES, strict=True)
    ],
)
def test_blocks_run(page: Path, command: Command, standing: Standing, page_folder: Callable[[], Path]) -> None:
    """From top to bottom in a folder of the page's own."""
    folder = page_folder()
    names: dict[str, object] = {"__name__": "docs"}  # the Python of a page is one session
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        if block.kind == "console":
            for line in typed(block):
                words = words_of(line)
                assert words is not None, line
                run(words, line, folder, command, standing)
        elif block.kind == "python":
            standing.put(re.findall(r"[\w.-]+", block.body), folder, command)
            exec(compile(block.body, block.page, "exec"), names)
        elif block.kind == "yaml":
            make_recipe(yaml.safe_load(block.body))


def run(words: list[str], line: str, folder: Path, command: Command, standing: Standing) -> None:
    """Run a command made cheap; what it writes replaces what an earlier line has written."""
    output = output_of(words)
    inputs = [word for word in words if word != output]
    standing.put(inputs, folder, command)
    if output is not None and (folder / output).exists() and "--overwrite" not in words:
        standing.make_way(folder / output)
    if "--emit-adapter" in words:
        shutil.rmtree(folder / words[words.index("--emit-adapter") + 1], ignore_errors=True)
    cheap = small(words, folder)
    done = standing.same(cheap, output)
    if done is not None and output is not None:
        (folder / output).symlink_to(done)
        return
    result = command(*cheap)
    allowed = (0, 1) if words[0] == "doctor" else (0,)  # 1: something is wrong with this machine
    assert result.code in allowed, f"{line}\n{result.err}"
    standing.remember(cheap, output, folder)
    assert output is None or "--dry-run" in words or (folder / output).exists(), line


def test_how_many_are_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Few, and each for a reason."""
    left: list[Block] = [block for block in BLOCKS if block.reason is not None]
    run_here = sum(len(typed(block)) for block in BLOCKS if block.reason is None)
    with capsys.disabled():
        print(f"\n{run_here} commands of the documentation run; {len(left)} blocks not:")
        for block in left:
            print(f"  {block.page}: {block.reason}")
    assert run_here > 3 * sum(len(typed(block)) for block in left)
