"""Tiny random models, packed by hand into folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.formats import Masked, SparseInt, pack, tensor_name
from compressor.hf.experts import unfuse
from compressor.hf.reader import packed_config, reader_source


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random causal language model of ``llama`` (GQA, tied), ``qwen3_moe`` or ``gpt2``."""
    import transformers

    common = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    if family == "llama":
        config: Any = transformers.LlamaConfig(**common, **llama, tie_word_embeddings=True)
    elif family == "qwen3_moe":
        mixture = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        config = transformers.Qwen3MoeConfig(**common, **llama, **mixture, tie_word_embeddings=False)
    else:
        config = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    torch.random.set_rng_state(state)
    return model


def representation_of(weight: Tensor, number: int) -> Masked | SparseInt:
    """Return matrix ``number`` pruned: in turn by half, 2:4, and by half with 3-bit codes."""
    generator = torch.Generator().manual_seed(number)
    if number % 3 == 1:
        order = torch.rand(weight.shape[0], weight.shape[1] // 4, 4, generator=generator).argsort(-1)
        return Masked(weight, (order < 2).view(weight.shape), (2, 4))
    mask = torch.rand(weight.shape, generator=generator) < 0.5
    if number % 3 == 0:
        return Masked(weight, mask)
    codes = torch.randint(0, 8, weight.shape, generator=generator, dtype=torch.uint8)
    scale = (weight.float().abs().amax(dim=1) / 4).half()
    return SparseInt(codes, scale, torch.full_like(scale, 3, dtype=torch.uint8), mask, 3)


def write_folder(model: Any, packed: Path) -> dict[str, Any]:
    """Write ``model`` pruned and packed into a new folder; return the manifest. ``model`` itself gets the zeros too."""
    packed.mkdir(parents=True)
    source = json.loads(model.config.to_json_string())
    unfuse(model)
    dtype = model.dtype
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    modules: dict[str, Any] = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and name != "lm_head"
    }
    for number, (name, module) in enumerate(linears.items()):
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.detach().T if transposed else module.weight.detach()
        representation = representation_of(weight.contiguous(), number)
        modules[name], parts = pack(representation, dtype)
        del tensors[f"{name}.weight"]
        tensors |= {tensor_name(name, part): tensor for part, tensor in parts.items()}
        zeros = representation.dense().to(dtype)
        module.weight.data = (zeros.T if transposed else zeros).contiguous()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, packed / "model.safetensors")
    (packed / "config.json").write_text(json.dumps(packed_config(source, modules)))
    (packed / "modeling_compressor.py").write_text(reader_source())
    return modules
