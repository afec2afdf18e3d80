"""Calibration text sampled from the model itself: no data needed (LLM-QAT, arXiv 2305.17888, section 3.1)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.tokens import Tokenizer, vocabulary_size
from compressor.errors import UserError


def sample_from_model(
    model: Any,
    tokenizer: Tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    temperature: float = 1.0,
    *,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return ``nsamples`` texts of ``seqlen`` tokens that ``model`` writes: ids (nsamples, seqlen) int64 on the CPU.

    Each text starts from BOS, which is not part of it; without a BOS its first token is a random one, uniform over
    the vocabulary. Tokens are drawn from the full softmax by inverting its cumulative sum at uniform numbers that were
    drawn for all texts beforehand, so the result does not depend on ``batch`` beyond rounding. An end-of-sequence
    token is kept and the model writes on. Ids beyond the tokenizer's vocabulary (a padded embedding) are never drawn.

    Args:
        model: any causal LM of ``transformers``; its mode is restored.
        progress: called with (tokens done, tokens in all) after each step.

    Raises:
        UserError: ``seqlen`` is beyond the model's positions, or the temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"the sampling temperature must be above 0, not {temperature}", fix="use 1.0")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and seqlen > most:
        raise UserError(f"--seqlen {seqlen} is beyond the {most} positions of the model", fix=f"use --seqlen {most}")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(vocabulary_size(tokenizer), model.get_input_embeddings().weight.shape[0])
    bos = tokenizer.bos_token_id
    if bos is None:
        first = torch.randint(vocabulary, (nsamples, 1), generator=generator)
    else:
        first = torch.full((nsamples, 1), bos, dtype=torch.int64)
    new = seqlen if bos is not None else seqlen - 1
    uniforms = torch.rand(nsamples, new, generator=generator, dtype=torch.float64)
    was_training = model.training
    model.eval()
    texts: list[Tensor] = []
    try:
        with torch.no_grad():
            for start in range(0, nsamples, batch):
                rows = slice(start, start + batch)
                done = start * new

                def step(written: int, rows_now: int = len(first[rows]), done: int = done) -> None:
                    if progress is not None:
                        progress(done + written * rows_now, nsamples * new)

                texts.append(_continue(model, first[rows], uniforms[rows], vocabulary, temperature, step))
    finally:
        model.train(was_training)
    ids = torch.cat(texts)
    return ids[:, 1:].contiguous() if bos is not None else ids


def _continue(
    model: Any, first: Tensor, uniforms: Tensor, vocabulary: int, temperature: float, step: Callable[[int], None]
) -> Tensor:
    """Return ``first`` (B, 1) and one new token for each column of ``uniforms`` (B, T): (B, 1 + T) int64."""
    device = model.get_input_embeddings().weight.device
    ids, cache = first, None
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for position in range(uniforms.shape[1]):
        # a model that returns no cache (a recurrent one) reads the whole text again at every step
        fed = ids if cache is None else ids[:, -1:]
        past: dict[str, Any] = {} if cache is None else {name: cache}
        output = model(input_ids=fed.to(device), use_cache=True, **past)
        cache = getattr(output, name, None)
        logits = output.logits[:, -1, :vocabulary].to(device="cpu", dtype=torch.float64) / temperature
        ids = torch.cat([ids, draw(logits, uniforms[:, position])], dim=1)
        step(position + 1)
    return ids


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one id per row (B, 1) int64 from softmax(``logits`` (B, V) fp64) at ``uniforms`` (B,) in [0, 1).

    The smallest id whose cumulative probability exceeds the uniform number; an id of probability 0 is never drawn.
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    # scaled to the sum as rounded, so that the target always lies below the last entry
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
