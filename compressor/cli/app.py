"""The command ``compressor``: a table of verbs, one file each."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated

import typer

import compressor
from compressor.cli.adapter import adapter
from compressor.cli.bench import bench
from compressor.cli.compare import compare
from compressor.cli.doctor import doctor
from compressor.cli.evaluate import evaluate
from compressor.cli.explain import explain
from compressor.cli.export import export
from compressor.cli.generate import generate
from compressor.cli.kernels import kernels
from compressor.cli.push import push
from compressor.cli.run import plan, run
from compressor.cli.stages import decompose, linearize, prune, quantize
from compressor.engine.imports import end_quickly
from compressor.errors import NO_ROOM, UserError

app = typer.Typer(
    name="compressor",
    help="Make Hugging Face causal language models smaller and faster, and know what it cost.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    rich_markup_mode="rich",
)

for verb in (
    prune, quantize, decompose, linearize, run, plan, evaluate, compare, explain, generate, bench, adapter, export,
    push, doctor,
):  # fmt: skip
    app.command()(verb)
app.add_typer(kernels)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"compressor {compressor.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback instead of a one-line error.")] = False,
) -> None:
    """Options that stand before the verb."""


def main() -> None:
    """Run the command line; a mistake of the user ends in one line and exit code 2."""
    end_quickly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an arrow that the terminal cannot show is no reason to stop
            stream.reconfigure(errors="replace")
    debug = "--debug" in sys.argv
    words = [word for word in sys.argv[1:] if word != "--debug"]
    drawn = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    for name, value in library_defaults(words, drawn).items():
        os.environ.setdefault(name, value)
    told = not drawn and not {"-q", "--quiet"} & set(words)
    sys.argv = [sys.argv[0], *(words or ["--help"])]
    try:
        with downloads_told() if told else nullcontext():
            code = app(standalone_mode=False, prog_name="compressor")
    except Exception as error:
        message = _complaint(error)
        if debug or message is None:
            raise
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise SystemExit(2) from None
    raise SystemExit(code or 0)


def library_defaults(words: list[str], drawn: bool) -> dict[str, str]:
    """Return environment variables of libraries that are not loaded yet, for where the user has set none.

    Args:
        words: of the command line.
        drawn: whether standard error is a terminal that can draw.
    """
    found = {"TOKENIZERS_PARALLELISM": "false"}
    if words[:1] != ["bench"]:  # which measures the original as programs run it that set nothing
        found["OMP_WAIT_POLICY"] = "passive"  # PyTorch's threads wait without keeping anybody from a processor
    if not drawn:  # a log is no place for their bars
        found |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return found


@contextmanager
def downloads_told() -> Iterator[None]:
    """Within, what is fetched from a hub is told on standard error, for want of bars."""
    log, handler = logging.getLogger("compressor.hub"), logging.StreamHandler(sys.stderr)
    level, log.propagate = log.level, False  # else a library that logs to the terminal says it again
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True


def _complaint(error: Exception) -> str | None:
    """What to tell the user of an error; ``None`` when it is no mistake of theirs."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:  # the system names no file that was only written to
        return f"{NO_ROOM[error.errno]} ({error}); make room and run the same again"
    if isinstance(error, (UserError, OSError)):  # OSError: a permission, seen only on the way
        return str(error)
    if hasattr(error, "format_message"):  # a word on the command line that the parser refuses
        context = getattr(error, "ctx", None)  # of the whole program where there is no such verb
        verb = context.command_path if context else " ".join(["compressor", *sys.argv[1:2]])
        return f"{error.format_message().replace('Value error, ', '')} (see {verb} --help)"
    return None


if __name__ == "__main__":
    main()
