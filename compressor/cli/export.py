"""``compressor export``: a packed folder in a form that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compressor.cli.common import Model

Format = Literal["dense"]


def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.", metavar="DEST")],
    form: Annotated[Format, typer.Option("--format", help="What to write: dense, a plain checkpoint.")] = "dense",
) -> None:
    """Write a packed model for other programs. dense: a plain checkpoint, with the names and dtypes of the source.

    Stock transformers loads it, and every runtime that knows the architecture.

    Example: compressor export pruned plain --format dense
    """
    from compressor.report.numbers import bytes_text
    from compressor.run.export import export_dense

    done = export_dense(model, output)
    typer.echo(f"{done.matrices} packed matrices were unpacked; {output} holds {bytes_text(done.tensor_bytes)}")
