"""``compressor adapter``: the low-rank corrections of a model, as a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import Model


def adapter(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
) -> None:
    """Take a model made with --correct apart: a folder with the codes alone, and in it a PEFT adapter.

    Where the codes are symmetric integers, stock transformers with compressed-tensors loads the folder, and
    PeftModel.from_pretrained(model, "OUT/adapter") adds the corrections.

    Example: compressor adapter corrected -o apart
    """
    from compressor.report.numbers import bytes_text
    from compressor.run.adapter import ADAPTER, split_adapter

    split = split_adapter(model, output)
    typer.echo(f"{split.corrections} corrections ({bytes_text(split.adapter_bytes)}) are in {output / ADAPTER}")
