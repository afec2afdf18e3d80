"""What lies beside the weights of an export: a card, and the report of the folder it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.engine.hub_names import commit_of, shown_name
from compressor.report import schema_use
from compressor.report.card import WEIGHTS, files_told, model_card
from compressor.report.card_front import GATING, INHERITED, OURS, front_matter_of, with_form
from compressor.report.contents import ABOUT, read_contents
from compressor.report.environment import yaml_text
from compressor.report.files import REPORT, read_report
from compressor.report.gguf_contents import gguf_in, read_gguf
from compressor.report.numbers import bytes_text
from compressor.report.schema import LINEARS, Report
from compressor.report.schema_use import Runtime
from compressor.run.export import Exported

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
    card = source / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    if (source / REPORT).is_file():
        report = _report(folder, source, done, use)
        (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        written = model_card(report, text)
    else:
        written = _plain_card(folder, source, done, use, front_matter_of(text))
    (folder / CARD).write_text(written, encoding="utf-8")
    return done


def _report(folder: Path, source: Path, done: Exported, use: Use) -> Report:
    """The report of ``source``, with what ``folder`` is."""
    contents = read_contents(folder) if (file := gguf_in(folder)) is None else read_gguf(file)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    exported = schema_use.Exported(
        form=done.form,
        file_bytes=contents.weight_bytes,
        disk_bytes=sum(size for name, size in sizes.items() if name not in ABOUT),
        bits_per_weight_linears=contents.bits(*LINEARS),
        bits_per_weight_model=contents.bits(),
        exact=done.exact,
        notes=list(done.notes),
        files=sorted({*sizes, REPORT}),
        source=shown_name(source),
        made_for=use.made_for,
        library=use.library,
        tag=use.tag,
    )
    report = read_report(source)
    answered = [result.model_copy(update={"before_export": True}) for result in report.tasks]
    return report.model_copy(update={"exported": exported, "runtimes": list(use.runtimes), "tasks": answered})


def _plain_front(source: Path, inherited: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """The head of a card where no report says what was done: the model is what it was."""
    front = {key: inherited[key] for key in inherited if key in INHERITED or str(key).startswith(GATING)}
    if commit_of(source) is not None:
        front |= {"base_model": shown_name(source), **({} if exact else {"base_model_relation": "quantized"})}
    return front | {"pipeline_tag": inherited.get("pipeline_tag", "text-generation"), "tags": [OURS]}


def _plain_card(folder: Path, source: Path, done: Exported, use: Use, inherited: dict[str, Any]) -> str:
    """The card of an export where no report says what was done before."""
    front = with_form(_plain_front(source, inherited, exact=done.exact), use.library, use.tag)
    exactness = "Every value is the same as" if done.exact else "Some values were rounded more than"
    weights = sorted(file for file in folder.iterdir() if file.name.endswith(WEIGHTS))
    size = sum(file.stat().st_size for file in weights)
    named = files_told([file.name for file in weights])
    lines = [
        f"# {shown_name(source)}, {done.form}",
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
