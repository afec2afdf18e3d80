"""``compressor adapter``: the low-rank terms of a model, as a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import Model
from compressor.cli.run import emit


def adapter(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
) -> None:
    """Take a model with low-rank corrections or matrices apart: a folder without them, and in it a PEFT adapter.

    What is left of a low-rank matrix is zero. Stock transformers loads the folder where what is left is dense, and with
    compressed-tensors where it is symmetric integers; PeftModel.from_pretrained(model, "OUT/adapter") adds the rest.

    Example: compressor adapter corrected -o apart
    """
    emit(model, output)
