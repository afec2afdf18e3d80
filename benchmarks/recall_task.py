"""Multi-query associative recall: a small model that is trained to solve it, and texts whose keys lie beyond a window.

A text is 8 pairs of a key and a value, a gap of filler, and the 8 keys again in another order, each followed by its
value. With a gap of 64 tokens and a window of 16 no pair is in the window when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PAIRS, KEYS, VALUES, FILLER = 8, 32, 32, 32
GAP = 64
LENGTH = 4 * PAIRS + GAP
VOCABULARY = KEYS + VALUES + FILLER
RATE = 2e-3
LESSONS: tuple[tuple[int, int | None], ...] = ((2, 0), (4, 0), (PAIRS, 0), (PAIRS, 16), (PAIRS, None))
"""Pairs and gap, from easy to hard; the next one begins when one is solved."""

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def texts(count: int, generator: torch.Generator, gap: int | None = None, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Return ids (count, LENGTH) and where the answers stand, a mask of the same shape.

    Args:
        gap: filler tokens between pairs and questions; None: any number up to ``GAP``, for each text its own.
    """
    ids = torch.randint(KEYS + VALUES, VOCABULARY, (count, LENGTH), generator=generator)
    answers = torch.zeros(count, LENGTH, dtype=torch.bool)
    for row in range(count):
        keys = torch.randperm(KEYS, generator=generator)[:pairs]
        values = KEYS + torch.randint(0, VALUES, (pairs,), generator=generator)
        space = int(torch.randint(0, GAP + 1, (1,), generator=generator)) if gap is None else gap
        asked = torch.randperm(pairs, generator=generator)
        start = 2 * pairs + space
        ids[row, : 2 * pairs] = torch.stack([keys, values], 1).flatten()
        ids[row, start : start + 2 * pairs] = torch.stack([keys[asked], values[asked]], 1).flatten()
        answers[row, start + 1 : start + 2 * pairs : 2] = True
    return ids, answers


@torch.no_grad()
def accuracy(model: Any, gap: int, count: int = 128, seed: int = 4711) -> float:
    """How often the model's first choice is the right value; texts that were never trained on."""
    ids, answers = texts(count, torch.Generator().manual_seed(seed + gap), gap)
    guesses = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    right = guesses == ids[:, 1:]
    return float(right[answers[:, 1:]].float().mean())


def train_teacher(folder: Path, steps: int = 6000, say: Callable[[str], None] = print) -> None:
    """Train the model that solves the task, and write it as a checkpoint with a tokenizer of numbered words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    lesson, since, smooth = 0, 0, 0.0
    for step in range(steps):
        pairs, gap = LESSONS[lesson]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 50) * min(1.0, 6 * (1 - step / steps) + 0.02)
        ids, answers = texts(64, generator, gap, pairs)
        length = LENGTH if gap is None else 4 * pairs + gap
        ids, answers = ids[:, :length], answers[:, 1:length]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][answers]
        wanted = ids[:, 1:][answers]
        loss = cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right = float((logits.argmax(-1) == wanted).float().mean())
        smooth, since = 0.95 * smooth + 0.05 * right, since + 1
        if smooth > 0.97 and since > 40 and lesson + 1 < len(LESSONS):
            lesson, since, smooth = lesson + 1, 0, 0.0
        if smooth > 0.999 and lesson + 1 == len(LESSONS) and since > 150:
            break
        if step % 200 == 0:
            say(f"teacher, step {step}, lesson {lesson + 1} of {len(LESSONS)}: {right:.0%} right")
    model.eval().save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)


def write_texts(file: Path, count: int, seed: int) -> None:
    """Write token windows to train on (count, LENGTH), as a file that ``--calibration`` takes."""
    import numpy as np

    ids, _ = texts(count, torch.Generator().manual_seed(seed))
    np.save(file, ids.numpy())
