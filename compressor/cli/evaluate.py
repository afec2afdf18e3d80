"""``compressor evaluate``: perplexity, and distance to another model, on held-out text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressor.cli.common import Json, Model, Quiet, TrustRemoteCode, Verbose, make_voice, print_json
from compressor.engine.imports import uncollected


def evaluate(
    model: Model,
    against: Annotated[
        str | None, typer.Option("--against", help="The model it was made from: adds KL divergence and agreement.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Named text or file; may be given several times.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", help="Windows of each text (default: all).", min=1)
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens in a window (default: 2048, or the model's context).", min=2)
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Step between windows (default: seqlen, they do not overlap).", min=1)
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the BOS token.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on named or local text; with --against also mean KL divergence and top-1 agreement.

    Example: compressor evaluate pruned --against embedded --text embedded-heldout
    """
    from compressor.cli.show import print_evaluation

    with uncollected(for_good=True):
        from compressor.run.judge import judge_model

    result: list[dict[str, Any]] = judge_model(
        model,
        against=against,
        texts=tuple(text or ()),
        windows=windows,
        seqlen=seqlen,
        stride=stride,
        bos=bos,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        voice=make_voice(verbose, quiet),
    )
    if as_json:
        print_json(result)
    else:
        print_evaluation(result)
