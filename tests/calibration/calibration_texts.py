"""Texts, files and small real tokenizers, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "a", "small", "old", "river", "house", "goes", "sees", "finds", "and", "then", "under", "over"]
WORDS += ["quickly", "blue", "stone", "child", "été", "naïve", "12", "345"]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def sentences(seed: int, count: int, words: int = 40) -> list[str]:
    """Return ``count`` different texts."""
    source = random.Random(seed)
    return [" ".join(source.choice(WORDS) for _ in range(words)) + "." for _ in range(count)]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    return write_jsonl(path, ({"text": text} for text in texts))


def build_tokenizer(*, special: bool = True, template: str | None = None) -> Any:
    """Return a byte-level BPE tokenizer of about 400 tokens; ``special`` gives it BOS and EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"] if special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(0, 50), trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"} if special else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer
