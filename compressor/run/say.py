"""Continuing a prompt, with a generator of its own for the sampling."""

from __future__ import annotations

import torch

from compressor.errors import UserError
from compressor.hf.caches import read_on
from compressor.run.progress import without_bars
from compressor.run.whole import find_model


@torch.no_grad()
def continue_text(
    model: str,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Return ``prompt`` and its continuation by a model, packed or plain.

    Args:
        model: folder, hub id, or ``embedded``.
        prompt: what it goes on from.
        tokens: so many at most; fewer where the context is full or the text ends.
        temperature: 0 takes the likeliest token at each step.
        seed: of the sampling.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, ...
        trust_remote_code: run code that the folder brings along.

    Raises:
        UserError: unknown model or device, no tokenizer, an empty prompt or one that fills the context.
    """
    found = find_model(model, trust_remote_code=trust_remote_code)
    tokenizer = found.tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if not ids.numel():
        raise UserError("the prompt has no tokens", fix="--prompt TEXT")
    room = (found.context or ids.numel() + tokens) - ids.numel()
    if room < 1:
        raise UserError(f"the prompt of {ids.numel()} tokens fills the model's context", fix="shorten --prompt")
    network = found.load(dtype=dtype, device=device)
    place = network.device
    generator = torch.Generator().manual_seed(seed)
    out, cache, step = ids.to(place), None, ids.to(place)
    for _ in range(min(tokens, room)):
        with without_bars():  # compressed-tensors unpacks its matrices at the first call
            result, cache = read_on(network, cache, input_ids=step)
        logits = result.logits[0, -1].float().cpu()
        if temperature > 0:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[None].to(place)
        else:
            step = logits.argmax()[None, None].to(place)
        if int(step) == tokenizer.eos_token_id:
            break
        out = torch.cat([out, step], dim=1)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
