"""Tiny random models of real classes, a tokenizer and texts for them, and shorthands to compress them in process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import build_skeleton
from compressor.report.schema import Report
from compressor.run.recipe import make_recipe
from compressor.run.stream import Options, compress

VOCABULARY = 288
LENGTH = 24  # tokens in a window, more than every sliding window here
WORDS = ["the", "a", "small", "old", "river", "house", "goes", "sees", "finds", "and", "then", "under", "over", "blue"]
WORDS += ["quickly", "stone", "child", "été", "naïve", "12", "345"]


def _llama_like(**more: Any) -> dict[str, Any]:
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {**common, **heads, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **more}


def _gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **sizes)


def _neox() -> Any:
    options = _llama_like(tie_word_embeddings=False)
    del options["num_key_value_heads"]
    return transformers.GPTNeoXConfig(**options)


def _opt() -> Any:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return transformers.OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, word_embed_proj_dim=32, **sizes, **special
    )


_GEMMA = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_MIXTURE = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_llama_like(tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2Config(**_llama_like(tie_word_embeddings=False)),
    "qwen3": lambda: transformers.Qwen3Config(**_llama_like(head_dim=8, tie_word_embeddings=True)),
    "mistral": lambda: transformers.MistralConfig(**_llama_like(sliding_window=8, tie_word_embeddings=False)),
    "gemma2": lambda: transformers.Gemma2Config(**_llama_like(**_GEMMA, query_pre_attn_scalar=8)),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_llama_like(**_GEMMA, query_pre_attn_scalar=8)),
    "phi3": lambda: transformers.Phi3Config(**_llama_like(tie_word_embeddings=False)),
    "gpt2": _gpt2,
    "neox": _neox,
    "opt": _opt,
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_llama_like(head_dim=8, **_MIXTURE, moe_intermediate_size=16, num_experts=8, norm_topk_prob=True)
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_llama_like(**_MIXTURE, num_local_experts=4)),
}


def random_model(family: str, *, seed: int = 0, scale: float = 0.15, dtype: Any = torch.float32, **more: Any) -> Any:
    """A model of ``family`` with weights large enough for its logits to depend on everything; ``more`` goes over its
    config."""
    config = FAMILIES[family]()
    for key, value in more.items():
        setattr(config, key, value)
    if "num_hidden_layers" in more and getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * more["num_hidden_layers"]
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(scale * noise)
            else:
                parameter.add_((0.05 * noise).to(dtype))
    return model


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of ``VOCABULARY`` tokens with BOS and EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text(0)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def text(seed: int, words: int = 3000) -> str:
    """A text of random words."""
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) for _ in range(words)) + "."


def save(model: Any, folder: Path, **how: Any) -> Path:
    """Save a model and the tokenizer."""
    model.save_pretrained(folder, **how)
    tokenizer().save_pretrained(folder)
    return folder


def random_ids(windows: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Token ids (windows, length)."""
    return torch.randint(2, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits (windows, length, vocabulary) by ``AutoModelForCausalLM``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def open_runner(folder: Path) -> BlockRunner:
    """A block runner with its outer tensors loaded."""
    skeleton = build_skeleton(open_checkpoint(folder))
    runner = BlockRunner(skeleton, device=torch.device("cpu"), dtype=torch.float32)
    runner.load_outer()
    return runner


def streamed_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits (windows, length, vocabulary) by the engine, block by block."""
    runner = open_runner(folder)
    stream: Stream = runner.start(ids)
    runner.run(stream)
    return runner.logits(stream, slice(0, len(ids)))


def recipe_for(calibration: Path | None, *stages: dict[str, Any], **content: Any) -> Any:
    """A recipe on short windows; nothing evaluated and not verified unless ``content`` says so.

    A stage without a kind is one of pruning.
    """
    sections: dict[str, Any] = {"verify": False, "evaluation": {"texts": ["none"]}}
    if calibration is not None:
        sections["calibration"] = {"sources": [str(calibration)], "nsamples": 16, "seqlen": LENGTH}
    listed = [
        stage if stage.keys() <= {"prune", "quantize", "decompose", "linearize"} else {"prune": stage}
        for stage in stages
    ]
    return make_recipe({"stages": listed, **sections, **content})


def run_recipe(recipe: Any, model: Path, output: Path, **options: Any) -> Report:
    """Compress in this process."""
    return compress(recipe, str(model), Options(output=output, **options))


def digest(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of the files of a folder, by name."""
    files = (file for file in sorted(folder.rglob(pattern)) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
