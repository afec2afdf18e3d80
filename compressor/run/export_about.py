"""What lies beside the weights of an export: a card, the report of the folder it was made from, its licence."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from compressor import __version__
from compressor.report import schema_use
from compressor.report.card_front import GATING, INHERITED, OURS, front_matter, front_matter_of
from compressor.report.environment import yaml_text
from compressor.report.files import REPORT, read_report
from compressor.report.numbers import bytes_text
from compressor.report.sentences import headline
from compressor.run.export import Exported

WEIGHTS = ("*.safetensors", "*.gguf")
LICENCES = ("LICENSE*", "NOTICE*")


def write_about(
    folder: Path,
    source: Path,
    done: Exported,
    commands: str,
    *,
    tag: str | None = None,
    runtimes: Sequence[schema_use.Runtime] = (),
) -> None:
    """Write ``README.md``, and ``report.json`` and licences where the source has them, into ``folder``.

    Args:
        source: folder the export was made from.
        commands: how to load it: a fenced block of Markdown, or several.
        tag: of the hub, for the form; None where it is a plain checkpoint.
        runtimes: what has read it.
    """
    weights = sorted(file for ending in WEIGHTS for file in folder.glob(ending))
    size = sum(file.stat().st_size for file in weights)
    for pattern in LICENCES:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    report = read_report(source) if (source / REPORT).is_file() else None
    if report is not None:
        exported = schema_use.Exported(form=done.form, file_bytes=size, exact=done.exact, notes=list(done.notes))
        report = report.model_copy(update={"exported": exported, "runtimes": list(runtimes)})
        (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    card = source / "README.md"
    inherited = front_matter_of(card.read_text(encoding="utf-8") if card.is_file() else None)
    if report is not None:
        front = front_matter(report, inherited)
    else:
        front = {key: inherited[key] for key in inherited if key in INHERITED or str(key).startswith(GATING)}
        front |= {"pipeline_tag": inherited.get("pipeline_tag", "text-generation"), "tags": ["compressor"]}
    front.pop("library_name", None)
    front["tags"] += [tag] if tag is not None and tag not in front["tags"] else []
    lines = [f"# {source.name}, {done.form}", ""]
    if report is not None:
        lines += [
            f"**{headline(report)}.** Measured on the folder this was made from; `report.json` has all of it.",
            "",
        ]
    exactness = "Every value is the same as" if done.exact else "Some values were rounded once more than"
    lines += [
        f"{_named(weights)}, {bytes_text(size)}, written by compressor {__version__}. {exactness} in "
        "the folder it was made from.",
        "",
        *(f"- {note}" for note in done.notes),
        *([""] if done.notes else []),
        "## Load",
        "",
        commands,
        "",
    ]
    (folder / "README.md").write_text(f"---\n{yaml_text(front)}---\n\n" + "\n".join(lines), encoding="utf-8")


def _named(weights: Sequence[Path]) -> str:
    return f"`{weights[0].name}`" if len(weights) == 1 else f"{len(weights)} weight files"


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
