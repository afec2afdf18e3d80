"""Continuing a prompt, with a generator of its own for the sampling."""

from __future__ import annotations

import torch

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.run.inputs import load_tokenizer
from compressor.run.plan import choose_device, choose_dtype, context_length


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
        temperature: 0 takes the likeliest token at each step.

    Raises:
        UserError: unknown model or device, no tokenizer, an empty prompt or one that fills the context.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = resolve_model(model)
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)  # refuses what is incomplete
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if not ids.numel():
        raise UserError("the prompt has no tokens", fix="--prompt TEXT")
    room = (context_length(skeleton.config) or ids.numel() + tokens) - ids.numel()
    if room < 1:
        raise UserError(f"the prompt of {ids.numel()} tokens fills the model's context", fix="shorten --prompt")
    place = choose_device(device)
    stored = skeleton.linears[0].dtype
    logging.disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=choose_dtype(dtype, place, stored), trust_remote_code=trust_remote_code
    )
    network = network.to(place).eval()
    generator = torch.Generator().manual_seed(seed)
    out, cache, step = ids.to(place), None, ids.to(place)
    for _ in range(min(tokens, room)):
        result = network(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[0, -1].float().cpu()
        if temperature > 0:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[None].to(place)
        else:
            step = logits.argmax()[None, None].to(place)
        if int(step) == tokenizer.eos_token_id:
            break
        out = torch.cat([out, step], dim=1)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
