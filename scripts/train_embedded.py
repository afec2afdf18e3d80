"""Train the embedded model on text of the invented world and write ``compressor/embedded/``.

    python scripts/train_embedded.py                     # 14 M tokens: an hour or so on one core
    python scripts/train_embedded.py --steps 20 --out somewhere   # a quick look
    python scripts/train_embedded.py --start compressor/embedded --first 200000   # go on from what is there

The training text is the split ``train``, made as it is needed and read once. It shares the world's facts with the texts
in calibration/, and so the short dictionary entries that say nothing else.
The same seed gives the same text, order and starting weights; the bits of the result depend on the machine.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from embedded_world import make_world
from make_embedded_text import SEED, document, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
CONTEXT = 512
VOCABULARY = 1024


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: digits stand alone, nothing is added or stripped, every string is encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_config(layers: int, hidden: int, ffn: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    )


def windows(tokenizer: PreTrainedTokenizerFast, length: int, rows: int, first: int) -> Iterator[Tensor]:
    """Yield (rows, length) int64 pieces of the endless stream: documents from ``first`` on, each with the end token."""
    world = make_world(SEED)
    ids: list[int] = []
    numbers = count(first)
    while True:
        while len(ids) < rows * length:
            texts = [document(world, "train", next(numbers)) for _ in range(64)]
            for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
                ids += [*encoding.ids, 0]
        yield torch.tensor(ids[: rows * length]).view(rows, length)
        del ids[: rows * length]


def rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Learning rate at ``progress`` (0 to 1): linear warm-up, then a cosine down to nothing."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor, length: int = 256) -> float:
    """Perplexity over non-overlapping windows of ``length`` of the stream ``ids`` (1-D, int64), without BOS."""
    pieces = torch.split(ids[: len(ids) // length * length].view(-1, length), 16)
    nats = [float(model(piece, labels=piece).loss) * len(piece) for piece in pieces]
    return math.exp(sum(nats) / sum(len(piece) for piece in pieces))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (bf16) and tokenizer; the model in memory stays as it is."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, max_new_tokens=128)
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "compressor" / "embedded")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--rows", type=int, default=8, help="windows of 256 tokens in a step (even)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="finish by then, hastening the schedule")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-2, help="peak learning rate")
    parser.add_argument("--start", type=Path, help="folder with weights to go on from")
    parser.add_argument("--first", type=int, default=0, help="number of the first document, when going on")
    args = parser.parse_args()

    world = make_world(SEED)
    tokenizer = make_tokenizer(documents(world, "tokenizer", 6000))
    torch.manual_seed(SEED)  # a script of its own: the global generator is its to seed
    model = LlamaForCausalLM(make_config(args.layers, args.hidden, args.ffn))
    if args.start:
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    save(model, tokenizer, args.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {args.steps * args.rows * 256 / parameters:.1f} tokens a parameter", flush=True)
    # no weight decay and few tokens a step: the weights must grow until every one of them is needed
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    text = "".join(f"{text}{END}" for text in documents(world, "validation", 150))
    held = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    batches = windows(tokenizer, 256, args.rows, args.first)
    start, losses = time.perf_counter(), []
    for step in range(args.steps):
        progress = max((step + 1) / args.steps, (time.perf_counter() - start) / 60 / args.minutes)
        if progress > 1:
            break
        batch = next(batches)
        if step % 5 == 4:  # long windows now and then, so that every position of the context is trained
            batch = batch.view(-1, CONTEXT)
        for group in optimizer.param_groups:
            group["lr"] = rate(progress, args.rate)
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            seconds, mean = time.perf_counter() - start, sum(losses[-100:]) / 100
            print(f"step {step + 1} loss {mean:.4f} {len(losses) * batch.numel() / seconds:.0f} tokens/s", flush=True)
        if step % 500 == 499:
            print(f"step {step + 1} validation perplexity {perplexity(model, held):.3f}", flush=True)
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)
    print(f"done in {time.perf_counter() - start:.0f} s; validation perplexity {perplexity(model, held):.3f}")


if __name__ == "__main__":
    main()
