"""Llama checkpoints of any size with random weights, written a tensor at a time.

``python -m benchmarks.synthetic FOLDER --blocks 12 --hidden 768 ...``. A process of its own, so that what measures
stays small.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RANK = 64
DTYPES = {"float32": 4, "bfloat16": 2}


def config(blocks: int, hidden: int, ffn: int, vocabulary: int, dtype: str) -> dict[str, Any]:
    """``config.json`` of such a model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
    }


def block_shapes(block: int, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one decoder block."""
    name = f"model.layers.{block}"
    return {
        **{f"{name}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"},
        **{f"{name}.mlp.{p}_proj.weight": (ffn, hidden) for p in ("gate", "up")},
        f"{name}.mlp.down_proj.weight": (hidden, ffn),
        f"{name}.input_layernorm.weight": (hidden,),
        f"{name}.post_attention_layernorm.weight": (hidden,),
    }


def outer_shapes(hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors outside the blocks."""
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def blocks_for(nbytes: float, hidden: int, ffn: int, vocabulary: int, dtype: str) -> int:
    """How many blocks make a checkpoint of at least ``nbytes``."""
    outer = sum(map(prod, outer_shapes(hidden, vocabulary).values())) * DTYPES[dtype]
    block = sum(map(prod, block_shapes(0, hidden, ffn).values())) * DTYPES[dtype]
    return max(1, -int((outer - nbytes) // block))


def shards_of(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: float) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, in files of at most about ``limit`` bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size and size + prod(shape) * itemsize > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += prod(shape) * itemsize
    return shards


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """fp32 weights (m, n) with a decaying spectrum above a floor of noise, from a generator seeded by the name."""
    import zlib

    import torch

    if len(shape) == 1:
        return torch.ones(shape)
    m, n = shape
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(m, n, generator=generator)
    left, right = torch.randn(m, RANK, generator=generator), torch.randn(RANK, n, generator=generator)
    decay = torch.arange(1, RANK + 1).rsqrt()
    return (noise.mul_(0.5).addmm_(left * decay, right, alpha=0.5)).div_(n**0.5)


def make(folder: Path, *, blocks: int, hidden: int, ffn: int, vocabulary: int, dtype: str, shard_bytes: float) -> None:
    """Write the checkpoint, with a tokenizer of one token a number."""
    import torch

    from compressor.engine.tensorfile import write_file

    folder.mkdir(parents=True)
    kind = getattr(torch, dtype)
    shapes = outer_shapes(hidden, vocabulary)
    for block in range(blocks):
        shapes |= block_shapes(block, hidden, ffn)
    shards = shards_of(shapes, DTYPES[dtype], shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {name: (kind, shape) for name, shape in shard.items()}
        write_file(folder / file, layout, lambda name, shard=shard: random_tensor(name, shard[name]).to(kind))  # type: ignore[misc]
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(map(prod, shapes.values())) * DTYPES[dtype]}, "weight_map": weight_map}
    files = {
        "config.json": config(blocks, hidden, ffn, vocabulary, dtype),
        "model.safetensors.index.json": index,
        "tokenizer.json": tokenizer(vocabulary),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """A ``tokenizer.json`` whose words are the numbers."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": {str(i): i for i in range(vocabulary)}, "unk_token": "0"},
    }


def make_ids(path: Path, *, windows: int, length: int, vocabulary: int) -> None:
    """Write token windows (windows, length) int64 for calibration."""
    import numpy as np

    draws = np.random.default_rng(0).zipf(1.3, size=(windows, length))
    np.save(path, (draws % vocabulary).astype(np.int64))


def main(argv: Sequence[str] | None = None) -> None:
    """Make a checkpoint and token ids for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--shard-bytes", type=float, default=500e6)
    parser.add_argument("--ids", type=Path, help="also write calibration ids here (.npy)")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args(argv)
    make(
        args.folder,
        blocks=args.blocks,
        hidden=args.hidden,
        ffn=args.ffn,
        vocabulary=args.vocabulary,
        dtype=args.dtype,
        shard_bytes=args.shard_bytes,
    )
    if args.ids:
        make_ids(args.ids, windows=args.windows, length=args.seqlen, vocabulary=args.vocabulary)


if __name__ == "__main__":
    main()
