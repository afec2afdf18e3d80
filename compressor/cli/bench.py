"""``compressor bench``: how fast a model is, against memory bandwidth and the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.common import Model, Quiet, TrustRemoteCode, Verbose, make_voice, typed_command
from compressor.cli.tables import say, wide_console
from compressor.engine.imports import uncollected
from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.report.schema_bench import Bench


def bench(
    model: Model,
    base: Annotated[
        str | None, typer.Option("--base", help="Model to hold it against (default: the one its report names).")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", help="Tokens before the timed ones (default: 0,512,2048 as far as they fit)."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Rows computed together, such as 1,8.")] = "1",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens timed in each place.", min=1)] = 32,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads (default: PyTorch's).", min=1)] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the model: stored, float32, bfloat16 or float16.")
    ] = "stored",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all numbers; - is standard output.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also write a page with plots.", metavar="FILE.html")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Time loading, prompts and single tokens, beside the model it was made from and the bandwidth of this memory.

    Example: compressor bench pruned --base embedded --context 0,128
    """
    from compressor.report.compare_page import check_target

    contexts = None if context is None else _numbers(context, "--context")
    batches = _numbers(batch, "--batch")
    plot = plot.expanduser() if plot else None
    if plot:
        check_target(plot)
    to_file = json_file.expanduser() if json_file is not None and str(json_file) != "-" else None
    if to_file is not None and (to_file.is_dir() or not to_file.parent.is_dir()):
        raise UserError(f"--json: {str(to_file)!r} is a folder, or in none", fix="name a file in a folder that exists")
    with uncollected(for_good=True):
        from compressor.run.bench import bench as measure

    result = measure(
        model,
        base=base,
        contexts=contexts,
        batches=batches,
        steps=tokens,
        threads=threads,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        command=typed_command(),
        voice=make_voice(verbose, quiet),
    )
    _give(result, json_file, to_file, plot, quiet=quiet)


def _give(result: Bench, json_file: Path | None, to_file: Path | None, plot: Path | None, *, quiet: bool) -> None:
    from compressor.cli.bench_tables import print_bench
    from compressor.report.bench_page import render_bench

    text = result.model_dump_json(indent=1) + "\n"
    if to_file is not None:
        to_file.write_text(text, encoding="utf-8")
    if plot is not None:
        plot.write_text(render_bench(result), encoding="utf-8")
    if json_file is not None and to_file is None:
        typer.echo(text, nl=False)
    elif not quiet:
        print_bench(result)
        if plot is not None:
            say(wide_console(), f"Plotted in {plot}")


def _numbers(words: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"{flag} {words}: expected numbers with commas between them", fix=f"{flag} 1,8") from None
