"""What the documentation takes from the code is what the code says."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from doc_blocks import FENCE, PAGES, ROOT

import compressor
from compressor.cli.app import app
from compressor.run.recipe import STAGES

sys.path.insert(0, str(ROOT / "scripts"))
import make_reference
import reference_numbers

METHODS = ROOT / "docs" / "methods"


def test_generated_parts_are_not_stale() -> None:
    stale = [str(path.relative_to(ROOT)) for path in make_reference.stale()]
    assert not stale, f"python scripts/make_reference.py renews {stale}"


def test_a_change_would_be_noticed() -> None:
    page = "<!-- begin section | output -->\n\nwhat it said before\n\n<!-- end -->"
    renewed = make_reference.filled(page)
    assert "`--dtype`" in renewed and "what it said before" not in renewed
    assert make_reference.filled(renewed) == renewed


def test_numbers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="0 headings"):
        reference_numbers.numbers("No such heading", "method", ".*")
    with pytest.raises(ValueError, match="no row"):
        reference_numbers.numbers("stories260k-llama, quantized", "method", "no such method")


def test_every_verb_and_method_has_a_page() -> None:
    from compressor.cli.app import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {group.typer_instance.info.name for group in app.registered_groups if group.typer_instance}
    assert {path.stem for path in (ROOT / "docs" / "verbs").glob("*.md")} - {"index"} == verbs
    assert {name for classes in STAGES.values() for name in classes} <= {path.stem for path in METHODS.glob("*.md")}


@pytest.mark.parametrize("page", [p for p in METHODS.glob("*.md") if p.stem != "index"], ids=lambda p: p.stem)
def test_a_method_page_has_all_that_it_should(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "## Settings" in text and "```console" in text
    assert "**When.**" in text and "**When not.**" in text, "when to take it and when not"
    assert page.stem in ("embeddings", "rtn", "svd") or re.search(r"arXiv\s[\d.]+", text), "the paper"
    assert "begin numbers" in text or re.search(r"[Mm]easured|Loss on stories", text), "numbers, or that there are none"


def test_the_schema_knows_the_ready_recipes() -> None:
    """Without a validator at hand: every key of every recipe is one of its stage's properties."""
    schema = json.loads(make_reference.SCHEMA.read_text(encoding="utf-8"))
    stages = {next(iter(s["properties"])): next(iter(s["properties"].values())) for s in stage_schemas(schema)}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert held.keys() <= schema["properties"].keys()
        for stage in held["stages"]:
            ((kind, settings),) = stage.items()
            known = [v for v in stages[kind]["oneOf"] if v["properties"]["method"]["const"] == settings["method"]]
            assert len(known) == 1 and settings.keys() <= known[0]["properties"].keys()


def stage_schemas(
    schema: dict[str, object],
) -> list[dict[str, dict[str, dict[str, list[dict[str, dict[str, dict[str, str]]]]]]]]:
    return schema["properties"]["stages"]["items"]["oneOf"]  # type: ignore[index,no-any-return,call-overload]


def test_no_page_names_a_file_that_is_not_there() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


API = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def told_of(found: Any) -> set[str]:
    """Arguments and attributes that a docstring explains."""
    sections = re.split(r"(?m)^(Args|Attributes|Returns|Raises):\n", inspect.getdoc(found) or "")
    held = "".join(text for head, text in zip(sections[1::2], sections[2::2], strict=True) if head[0] == "A")
    return {name for names in re.findall(r"(?m)^ {4}([\w, ]+): ", held) for name in names.split(", ")}


def test_the_page_on_python_explains_every_argument() -> None:
    """There, or once for all; and none that there is not."""
    found = {}
    for path in re.findall(r"<!-- begin api \| (\S+) -->", API):
        module, _, name = path.partition(":")
        found[path] = getattr(importlib.import_module(module), name)
    assert len(found) > 20
    anywhere = {name for each in found.values() for name in told_of(each)}
    for path, each in found.items():
        own = {name for name in inspect.signature(each).parameters if not name.startswith("_")}
        assert own <= anywhere, f"{path}: {own - anywhere}"
        assert told_of(each) <= own, f"{path}: {told_of(each) - own}"


def test_the_page_on_python_has_everything_public() -> None:
    public = {name for name, held in vars(compressor).items() if callable(held) and name[0] != "_" and name != "Any"}
    assert public and all(f"`compressor.{name}`" in API for name in {*public, "__version__"})
    rows = re.findall(r"(?m)^\| (`[^|]*) \| (`compressor\.[^|]*) \|$", API)
    verbs = {verb for left, _ in rows for verb in re.findall(r"`(\w+)`", left)}
    assert verbs == set(typer.main.get_command(app).commands) - {"kernels"}  # type: ignore[attr-defined]
    for _, right in rows:
        for path in re.findall(r"`(compressor[\w.]+)`", right):
            module, _, name = path.rpartition(".")
            assert callable(getattr(importlib.import_module(module), name)), path
            assert f":{name} -->" in API, f"{path} is not described"
