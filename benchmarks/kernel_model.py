"""A whole model of random weights, decoding in transformers: by every way to multiply, and without multiplying."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_matrices import PLANES, Packed, random_packed
from compressor.hf.caches import read_on
from compressor.hf.decoding import quicken
from compressor.hf.fast import accelerate
from compressor.hf.linear import PackedLinear
from compressor.run.bench_measure import with_our_product

ORIGINAL, OWN, FLOOR = "bf16", "bf16, own products", "no products"
WARM = 3
LONG = 512  # tokens of a prompt that is read once only


class Nothing(nn.Module):
    """Stands for a linear layer and gives zeros: what is left is what the framework takes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(layer.out_features, dtype=layer.weight.dtype), persistent=False)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to zeros (..., out)."""
        zero: Any = self.zero
        return zero.expand(*x.shape[:-1], -1)  # type: ignore[no-any-return]


@dataclass
class Way:
    """A model and the times of its tokens."""

    name: str
    model: Any
    nbytes: int
    prefill: list[float]
    steps: list[float]
    made: str
    cache: Any = None


def original(hidden: int, ffn: int, layers: int, vocabulary: int) -> Any:
    """A Llama in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=2048,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def emptied(model: Any) -> Any:
    """A copy of the model without its linear layers: :class:`Nothing` stands in their places."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    memo = {id(module): Nothing(module) for module in linears.values()}
    return copy.deepcopy(model, memo)


def with_planes(floor: Any, rung: str) -> tuple[Any, str]:
    """A copy of ``floor`` with two random trit planes in every linear layer, made fast; and what `accelerate` says.

    Layers of a shape are of the same numbers, each with its own memory.
    """
    model, shapes = copy.deepcopy(floor), dict[tuple[int, int], Packed]()
    for name, module in list(model.named_modules()):
        if isinstance(module, Nothing):
            shape = (module.out_features, module.in_features)
            if shape not in shapes:
                shapes[shape] = random_packed(PLANES, *shape)
            spec, parts = shapes[shape]
            layer = PackedLinear(spec, bias=False, dtype=torch.bfloat16)
            for part, tensor in parts.items():
                setattr(layer, f"weight_{part}", tensor.clone())
            model.set_submodule(name, layer)
    return model, str(accelerate(model, rung))


@torch.no_grad()
def _prefill(way: Way, ids: Tensor) -> float:
    began = time.thread_time()
    _, way.cache = read_on(way.model, None, input_ids=ids)
    return time.thread_time() - began


@torch.no_grad()
def _step(way: Way, token: int) -> float:
    began = time.thread_time()
    read_on(way.model, way.cache, input_ids=torch.tensor([[token]]))
    return time.thread_time() - began


def model_speed(sizes: tuple[int, int, int, int], rungs: list[str], steps: int, prompt: int) -> dict[str, Any]:
    """Processor seconds of a prefill and of every token after it, by way, in turns, on one thread.

    Args:
        sizes: hidden size, size of the feed-forward part, blocks, vocabulary.
        rungs: ways of `compressor.kernels.native` to measure beside the original; the first is the best instruction
            set, by which the original is multiplied, too.
        steps: tokens to decode.
        prompt: tokens of the prefill.
    """
    torch.set_num_threads(1)
    dense = original(*sizes)
    weights = sum(module.weight.numel() for module in dense.modules() if isinstance(module, nn.Linear))
    floor = emptied(dense)
    own = with_our_product(dense, rungs[0])
    ways = [Way(name, model, 2 * weights, [], [], "") for name, model in ((ORIGINAL, dense), (OWN, own))]
    ways.append(Way(FLOOR, floor, 0, [], [], ""))
    for rung in rungs:
        model, made = with_planes(floor, rung)
        layers = [module.fast for module in model.modules() if isinstance(module, PackedLinear)]
        ways.append(Way(rung, model, sum(fast.product.nbytes for fast in layers), [], [], made))
    quicken(floor, rungs[0])
    ids = torch.randint(0, sizes[3], (1, prompt), generator=torch.Generator().manual_seed(0))
    for _ in range(1 if prompt > LONG else 3):
        for way in ways:
            way.prefill.append(_prefill(way, ids))
    for step in range(WARM + steps):
        for way in ways:
            way.steps.append(_step(way, step))
    rows = [
        {"name": way.name, "bytes": way.nbytes, "prefill": way.prefill, "times": way.steps[WARM:], "made": way.made}
        for way in ways
    ]
    return {"sizes": list(sizes), "weights": weights, "prompt": prompt, "rows": rows}
