"""``compressor export``: a folder in a form that other programs read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compressor.cli.common import Model
from compressor.cli.tables import say, wide_console
from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.run.export import Exported

Format = Literal["dense", "compressed-tensors", "gguf", "mlx", "gptq"]
Type = Literal["auto", "F32", "F16", "BF16", "Q8_0", "Q4_0", "TQ2_0", "TQ1_0"]
TOKENIZERS = Literal["auto", "none"]


def export(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Folder to write; must not exist yet. By default MODEL-FORMAT.", metavar="DEST", show_default=False
        ),
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="What to write. dense: a plain checkpoint. compressed-tensors: for stock transformers and vLLM. gguf: "
            "for llama.cpp and what is built on it. mlx: for mlx-lm on Apple computers. gptq: for readers of GPTQ.",
        ),
    ] = "dense",
    kind: Annotated[
        Type | None,
        typer.Option(
            "--type",
            help="gguf only: type of the matrices. auto: what says the packed numbers exactly, else F16.",
            show_default="auto",
        ),
    ] = None,
    tokenizer: Annotated[
        TOKENIZERS | None,
        typer.Option(
            "--tokenizer",
            help="gguf only: auto writes the tokenizer, or refuses one that llama.cpp does not have; none leaves it "
            "out, and the file then works on token ids alone.",
            show_default="auto",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Before the result takes its place, load it in a fresh process, where there is a program for it and "
            "the memory, and compare its logits with those of MODEL.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="gguf only: say what would be exact and what rounded; write nothing.")
    ] = False,
) -> None:
    """Write a model for other programs: those who run it need not have compressor.

    Whatever a format cannot say is refused, by name and before the work.

    Example: compressor export pruned plain --format dense

    Example: compressor export quantized --format gguf --dry-run
    """
    from compressor.report.numbers import bytes_text
    from compressor.run.export import default_output, exporter

    console = wide_console()
    options: dict[str, Any] = {"verify": verify}
    chosen = {"kind": kind, "tokenizer": tokenizer, "dry_run": dry_run or None}
    for name, value in chosen.items():
        if value is not None and form != "gguf":
            flag = {"kind": "--type", "dry_run": "--dry-run"}.get(name, f"--{name}")
            raise UserError(f"{flag} belongs to --format gguf, not to {form}", fix=f"leave {flag} out")
        if value is not None:
            options[name] = value
    if form == "gguf":
        options["say"] = partial(say, console)
    output = output or default_output(model, form)
    done = exporter(form)(model, output, **options)
    if dry_run:
        return
    if form == "dense":
        say(console, f"{done.matrices} packed matrices were unpacked; {output} holds {bytes_text(done.tensor_bytes)}")
    else:
        values = "every value is that of the folder it was made from" if done.exact else "rounded once more:"
        say(console, f"{output} ({done.form or form}) holds {bytes_text(done.tensor_bytes)}; {values}")
    for note in done.notes:
        say(console, f"  {note}")
    for line in tried(done) or ["no program has loaded it yet"]:
        say(console, line)


def tried(done: Exported) -> list[str]:
    """What has read it, and how close that was, in lines."""
    from compressor.report.numbers import significant

    return [
        f"{'checked' if way.passed else 'NOT THE SAME'}: {way.name} ({way.version}), {way.check}; largest difference "
        f"{significant(way.difference, 2)} (allowed {significant(way.allowed, 2)})"
        for way in done.runtimes
    ]
