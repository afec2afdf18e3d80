"""What all commands share: how they speak, and how run settings become flags."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from compressor.cli.options import given, option
from compressor.cli.tables import json_text
from compressor.run.places import shortened
from compressor.run.progress import Voice
from compressor.run.settings import CalibrationSettings, EvaluationSettings, OutputSettings

Model = Annotated[
    str,
    typer.Argument(
        help="Model folder, hub id (org/name, org/name@revision), or 'embedded' (the tiny model that comes along).",
        metavar="MODEL",
    ),
]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model folder brings along.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]

PLACED = re.compile(r"(^-[A-Za-z](?=/)|^--?[\w-]+=|,)")
"""What may stand before a path within a word of a command line; kept in what `split` returns."""

# settings field -> flag, section by section
CALIBRATION_FLAGS = {"sources": "calibration", "nsamples": "nsamples", "seqlen": "seqlen", "seed": "seed"}
EVALUATION_FLAGS = {
    "texts": "eval",
    "windows": "eval-windows",
    "seqlen": "eval-seqlen",
    "baseline": "baseline",
    "samples": "samples",
    "tasks": "eval-tasks",
    "task_limit": "eval-task-limit",
    "task_shots": "eval-task-shots",
}
OUTPUT_FLAGS = {"save": "save", "dtype": "dtype", "device": "device", "verify": "verify"}
SECTIONS: tuple[tuple[str, Any, dict[str, str], str], ...] = (
    ("calibration", CalibrationSettings, CALIBRATION_FLAGS, "Calibration"),
    ("evaluation", EvaluationSettings, EVALUATION_FLAGS, "Evaluation"),
    ("", OutputSettings, OUTPUT_FLAGS, "Output"),
)


def run_options() -> list[inspect.Parameter]:
    """Flags for calibration, evaluation and output."""
    out = []
    for section, settings, flags, panel in SECTIONS:
        for field, flag in flags.items():
            parameter = option(f"{section}_{field}", settings.model_fields[field], flag=flag, panel=panel)
            out.append(parameter)
    return out


def run_content(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe's sections from the flags that were given."""
    content: dict[str, Any] = {}
    for section, _, flags, _ in SECTIONS:
        chosen = given({field: values.get(f"{section}_{field}") for field in flags}, flags)
        if section:
            content[section] = chosen
        else:
            content |= chosen
    return content


def make_voice(verbose: int, quiet: bool) -> Voice:
    """A voice on standard error."""
    return Voice(Console(stderr=True), -1 if quiet else verbose)


def typed_command() -> str:
    """The command line as typed, but with absolute paths cut to what tells them apart: a report is made to be shown."""
    words = [PLACED.split(word) for word in sys.argv[1:]]
    pieces = [piece for word in words for piece in word]
    places = shortened(filter(_is_place, pieces), (piece for piece in pieces if piece and not _is_place(piece)))
    return shlex.join(["compressor", *("".join(places.get(piece, piece) for piece in word) for word in words)])


def _is_place(piece: str) -> bool:
    return len(piece) > 1 and Path(piece).is_absolute()


def print_json(value: Any) -> None:
    """Print machine-readable output, alone on standard output."""
    typer.echo(json_text(value))
