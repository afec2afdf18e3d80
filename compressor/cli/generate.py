"""``compressor generate``: a look at what a model says."""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.common import Model, TrustRemoteCode


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens to generate at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.", min=0)] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt with a compressed (or any other) model.

    Example: compressor generate pruned --prompt "Once upon a time"
    """
    from compressor.run.say import continue_text

    text = continue_text(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(text)
