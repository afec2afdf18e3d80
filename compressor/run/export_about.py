"""What lies beside the weights of an export: a card, and the report of the folder it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.engine.hub_names import commit_of, shown_name
from compressor.report import schema_use
from compressor.report.card import export_card
from compressor.report.card_front import GATING, INHERITED, OURS, front_matter, front_matter_of
from compressor.report.environment import yaml_text
from compressor.report.files import REPORT, read_report
from compressor.report.numbers import bytes_text
from compressor.report.schema_use import Runtime
from compressor.run.export import Exported

WEIGHTS = ("*.safetensors", "*.gguf")
CARD = "README.md"


@dataclass(frozen=True)
class Use:
    """How an export is loaded.

    Attributes:
        made_for: Markdown, of what it was not tried with; empty where the runtimes say it all.
        library: what the hub calls the library that loads it; None where it has no word for it.
        tag: of the hub, for the form; None where it is a plain checkpoint.
        runtimes: what has loaded or read it.
    """

    made_for: str = ""
    library: str | None = None
    tag: str | None = None
    runtimes: Sequence[Runtime] = ()


def write_about(folder: Path, source: Path, done: Exported, use: Use) -> Exported:
    """Write the card, and the report where the source has one, into ``folder``, which holds all else.

    Args:
        source: folder the export was made from.

    Returns:
        ``done``, with the runtimes.
    """
    done = replace(done, runtimes=tuple(use.runtimes))
    weights = sorted(file for ending in WEIGHTS for file in folder.glob(ending))
    size = sum(file.stat().st_size for file in weights)
    card = source / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    name, files = shown_name(source), [file.name for file in weights]
    if not (source / REPORT).is_file():
        front = _front(_plain_front(source, front_matter_of(text), exact=done.exact), use)
        (folder / CARD).write_text(_plain_card(name, files, size, done, use, front), encoding="utf-8")
        return done
    listed = sorted({file.name for file in folder.iterdir()} | {REPORT})
    exported = schema_use.Exported(
        form=done.form, file_bytes=size, exact=done.exact, notes=list(done.notes), files=listed
    )
    report = read_report(source).model_copy(update={"exported": exported, "runtimes": list(use.runtimes)})
    (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    front = _front(front_matter(report, front_matter_of(text)), use)
    written = export_card(report, text, name=name, files=files, made_for=use.made_for, front=front)
    (folder / CARD).write_text(written, encoding="utf-8")
    return done


def _plain_front(source: Path, inherited: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """The head of a card where no report says what was done: the model is what it was."""
    front = {key: inherited[key] for key in inherited if key in INHERITED or str(key).startswith(GATING)}
    if commit_of(source) is not None:
        front |= {"base_model": shown_name(source), **({} if exact else {"base_model_relation": "quantized"})}
    return front | {"pipeline_tag": inherited.get("pipeline_tag", "text-generation"), "tags": [OURS]}


def _front(front: dict[str, Any], use: Use) -> dict[str, Any]:
    """The same with the form's library and tag."""
    tags = [*front["tags"], *([use.tag] if use.tag is not None and use.tag not in front["tags"] else [])]
    library = {"library_name": use.library} if use.library is not None else {}
    kept = {key: value for key, value in front.items() if key not in ("library_name", "tags")}
    return {**kept, **library, "tags": tags}


def _plain_card(name: str, files: Sequence[str], size: int, done: Exported, use: Use, front: dict[str, Any]) -> str:
    exactness = "Every value is the same as" if done.exact else "Some values were rounded more than"
    named = f"`{files[0]}`" if len(files) == 1 else f"{len(files)} weight files"
    lines = [
        f"# {name}, {done.form}",
        "",
        f"{named}, {bytes_text(size)}, written by compressor {__version__}. {exactness} in the model it was made from.",
        "",
        *(f"- {note}" for note in done.notes),
        *([""] if done.notes else []),
        "## Load",
        "",
        *(_tried(way) for way in use.runtimes if way.passed),
        *([use.made_for, ""] if use.made_for else []),
    ]
    return f"---\n{yaml_text(front)}---\n\n" + "\n".join(lines)


def _tried(way: Runtime) -> str:
    fence = "python" if way.language == "python" else "sh"
    return f"With {way.name} ({way.version}); checked: {way.check}.\n\n```{fence}\n{way.command}\n```\n"


def by_transformers(needs: str = "") -> str:
    """Markdown: how stock transformers loads a folder.

    Args:
        needs: a package that it needs beside itself.
    """
    before = f"With `pip install {needs}`:\n\n" if needs else ""
    first = "import compressor\n" if needs == OURS else ""
    return f"""{before}```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
