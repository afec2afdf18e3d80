"""What all proofs of a linearized model need of the two models: logits, parts, greedy continuations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from compressor.hf.linearized import linear_layers, only_parts
from compressor.mixers.spec import MEMORY, WHOLE, WINDOW, MixerSpec
from compressor.report.schema_linear import Who

UNIT = 64
"""What counts as a window where there is none: distances and buckets need a unit."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference of a logit that another order of sums makes, relative to the largest logit."""

PARTS: dict[Who, str] = {"student": WHOLE, "window": WINDOW, "memory": MEMORY}


def mixer_of(student: Any) -> MixerSpec | None:
    """Return what its linearized layers compute; None where that is not ours (a stock recurrent layer)."""
    return next(iter(linear_layers(student.config).values()), None)


def window_of(student: Any) -> int:
    """Return the tokens that a linearized layer attends to exactly; :data:`UNIT` where it has no window."""
    spec = mixer_of(student)
    return spec.window if spec is not None and spec.window and spec.join != "memory" else UNIT


def parts_of(student: Any) -> tuple[Who, ...]:
    """Return which parts can be looked at alone: window and memory where a layer joins the two."""
    spec = mixer_of(student)
    return ("window", "memory") if spec is not None and spec.join in ("shared", "sum") else ()


@contextmanager
def model_of(who: Who, teacher: Any, student: Any) -> Iterator[Any]:
    """Give the teacher, the student, or the student with some of its parts only."""
    with nullcontext() if who in ("teacher", "student") else only_parts(student, PARTS[who]):
        yield teacher if who == "teacher" else student


def device_of(model: Any) -> torch.device:
    """Return where the inputs of a model belong."""
    return torch.device(model.get_input_embeddings().weight.device)


def logits_of(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Return fp32 logits (B, T, vocabulary) of one pass without a cache; ``more`` goes to the model."""
    logits: Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False, **more).logits
    return logits.float()


def rounding(model: Any, logits: Tensor) -> float:
    """Return the difference of a logit that another order of sums may make."""
    return TOLERANCE[model.dtype] * float(logits.abs().max())


def greedy(model: Any, ids: Tensor, tokens: int, *, mask: Tensor | None = None, stop: bool = False) -> Tensor:
    """Continue texts by the most probable token, through the model's own ``generate`` and its cache.

    Args:
        ids: (B, T), left-padded where ``mask`` (B, T) is 0.
        tokens: how many.
        stop: end at the model's end-of-text token; what follows in a row is then padding.

    Returns:
        (B, <= tokens), on the CPU. Penalties and samplers that the model's generation config asks for are not applied.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id if stop else None
    padding = own.pad_token_id if own.pad_token_id is not None else 0
    device = device_of(model)
    # what a given config leaves open is filled from the model's, so that one has to go
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=padding)
    try:
        mask = torch.ones_like(ids) if mask is None else mask
        out: Tensor = model.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=tokens, do_sample=False, use_cache=True
        )
    finally:
        model.generation_config = own
    return out[:, ids.shape[1] :].cpu()
