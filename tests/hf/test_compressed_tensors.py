"""Folders of group integers load in stock transformers, bit for bit, whatever is mixed in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules, match_targets
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, Qwen3MoeConfig

from compressor.errors import UserError
from compressor.formats.group_int import GroupInt
from compressor.hf.compressed_tensors import group_int_specs, is_group_int, quantization_config
from compressor.methods import round_nearest
from compressor.methods.quantize_settings import RtnSettings

IDS = torch.arange(12)[None]
Choice = Callable[[str], dict[str, Any]]
"""Module path -> settings of rtn."""


@dataclass
class Made:
    """A folder, the specs it was made from, and a dense model of the same values."""

    folder: Path
    specs: dict[str, dict[str, Any]]
    model: Any
    headers: dict[str, tuple[str, tuple[int, ...]]]

    def config(self) -> dict[str, Any]:
        """Return the quantization_config that was written."""
        return json.loads((self.folder / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


def llama(dtype: torch.dtype, **more: Any) -> Any:
    """Return a random Llama with an awkward width (172 inputs) and grouped heads."""
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return _random(LlamaConfig(**sizes, **heads, **more), dtype)


def mixture(dtype: torch.dtype) -> Any:
    """Return a random mixture of experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return _random(Qwen3MoeConfig(**sizes, **heads, **experts), dtype)


def _random(config: Any, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(folder: Path, model: Any, choose: Choice) -> Made:
    """Save ``model`` with every projection quantized as ``choose`` says; the model gets the same values."""
    model.save_pretrained(folder)
    state, specs, dtype = load_file(folder / "model.safetensors"), {}, model.dtype
    for name in sorted(name for name in state if name.endswith("_proj.weight")):
        module = name.removesuffix(".weight")
        weight = state.pop(name)
        code = round_nearest.solve(weight.float(), None, RtnSettings(**choose(module))).code
        assert isinstance(code, GroupInt)
        specs[module] = code.spec(dtype)
        state |= {f"{name}_{part}": tensor for part, tensor in code.parts(dtype).items()}
        _put(model, module, code.dense(dtype))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(specs, linears)
    (folder / "config.json").write_text(json.dumps(config))
    headers = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}
    return Made(folder, specs, model, headers)


@torch.no_grad()
def _put(model: Any, module: str, value: Tensor) -> None:
    if (match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module)) is None:
        model.get_submodule(module).weight.copy_(value)
        return
    fused, number = model.get_submodule(match[1]), int(match[2])
    width = fused.down_proj.shape[2]
    target = fused.down_proj[number] if match[3] == "down_proj" else fused.gate_up_proj[number]
    rows = {"down_proj": slice(None), "gate_proj": slice(0, width), "up_proj": slice(width, None)}[match[3]]
    target[rows].copy_(value)


@torch.no_grad()
def check_loads(made: Made, **how: Any) -> Any:
    """Load with stock transformers, make it decompress, and hold weights and logits to the dense model."""
    model, info = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    model.eval()
    logits = model(IDS).logits  # a forward pass decompresses
    for name, parameter in made.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert model.get_parameter(name).dtype == parameter.dtype
    assert torch.equal(logits, made.model(IDS).logits)
    return model


def uniform(**choice: Any) -> Choice:
    return lambda module: choice


def mixed(module: str) -> dict[str, Any]:
    """Differ by kind, by block, and by width."""
    if "down_proj" in module:
        return {"bits": 3, "group": 128}
    if module == "model.layers.1.self_attn.q_proj":
        return {"bits": 8, "group": "row"}
    return {"bits": 4, "group": 16} if "self_attn" in module else {"bits": 5, "group": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choose", [uniform(bits=4, group=64), uniform(bits=3, group="row"), mixed])
def test_stock_transformers_gets_the_same_weights(tmp_path: Path, dtype: torch.dtype, choose: Choice) -> None:
    check_loads(make(tmp_path, llama(dtype), choose))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_every_width_of_codes(tmp_path: Path, bits: int) -> None:
    check_loads(make(tmp_path, llama(torch.bfloat16, tie_word_embeddings=True), uniform(bits=bits, group=43)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts(tmp_path: Path, dtype: torch.dtype) -> None:
    alike = check_loads(make(tmp_path / "alike", mixture(dtype), uniform(bits=4, group=16)))
    assert alike.model.layers[0].mlp.experts.gate_up_proj.dtype == dtype
    apart = make(tmp_path / "apart", mixture(dtype), lambda m: {"bits": 8 if "experts" in m else 3, "group": 16})
    assert len(apart.config()["config_groups"]) == 2
    check_loads(apart)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantized_while_loading(tmp_path: Path, asymmetric: bool) -> None:
    made = make(tmp_path, llama(torch.bfloat16), uniform(bits=4, group="row", asymmetric=asymmetric))
    check_loads(made, quantization_config=CompressedTensorsConfig(dequantize=True))


@torch.no_grad()
def test_how_to_compute_in_fp32_with_the_weights_of_a_bf16_folder(tmp_path: Path) -> None:
    """Asked for fp32, transformers does not round the products; so decompress first, and convert then.

    ``model.float()`` itself is refused for quantized models.
    """
    made = make(tmp_path, llama(torch.bfloat16), mixed)
    model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    model.hf_quantizer.compressor.decompress_model(model)
    expected = made.model.float()(IDS).logits
    assert torch.equal(nn.Module.float(model)(IDS).logits, expected)
    other = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    difference = (other(IDS).logits - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05


def test_the_body_alone_finds_its_weights(tmp_path: Path) -> None:
    made = make(tmp_path, llama(torch.bfloat16, tie_word_embeddings=True), uniform(bits=4, group=64))
    body, info = AutoModel.from_pretrained(made.folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        body(IDS)
    assert torch.equal(body.layers[1].mlp.up_proj.weight, made.model.model.layers[1].mlp.up_proj.weight)


def spec(bits: int = 4, group: int = 16, n: int = 32, symmetric: bool = True) -> dict[str, Any]:
    sizes = {"shape": [8, n], "dtype": "bfloat16", "bits": bits, "group": group, "symmetric": symmetric}
    return {"format": "group-int", **sizes}


def scheme_of(module: str, config: dict[str, Any], others: Iterable[str]) -> tuple[Any, ...] | None:
    """Which weights the package itself gives a linear layer of that name, in a model with ``others``."""
    parsed = QuantizationConfig.model_validate(config)
    model = nn.Module()
    for name in {module, *others}:
        owner = model
        for part in name.split(".")[:-1]:
            owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        owner.add_module(name.split(".")[-1], nn.Linear(1, 1, device="meta"))
    targets = {target: group for group in parsed.config_groups.values() for target in group.targets}
    matched = dict(match_named_modules(model, targets, parsed.ignore))
    if module not in matched:
        return None
    weights = targets[match_targets(module, matched[module], targets)[0]].weights
    return weights.num_bits, weights.strategy, weights.group_size, weights.symmetric


def test_every_module_gets_its_own_scheme_and_no_other_gets_one() -> None:
    specs = {
        "model.layers.0.self_attn.q_proj": spec(4),
        "model.layers.1.self_attn.q_proj": spec(4),
        "model.layers.10.self_attn.q_proj": spec(8),
        "model.layers.0.mlp.up_proj": spec(3),
        "model.layers.1.mlp.up_proj": spec(3),
        "model.layers.0.mlp.down_proj": spec(3, group=32),
        "transformer.h.0.attn": spec(4),
        "h.1.attn": spec(5),
        "odd+name.proj": spec(4, symmetric=False),
        "proj": spec(6),
    }
    left_out = ["lm_head", "model.layers.10.mlp.up_proj", "model.vision.layers.0.self_attn.q_proj", "models.h.0.attn"]
    config = quantization_config(specs, left_out)
    for module, made in specs.items():
        strategy = ("channel", None) if made["group"] == 32 else ("group", 16)
        assert scheme_of(module, config, [*specs, *left_out]) == (made["bits"], *strategy, made["symmetric"]), module
    for module in left_out:
        assert scheme_of(module, config, [*specs, *left_out]) is None
        assert module in config["ignore"]
    assert scheme_of("vision.layers.0.mlp.up_proj", config, specs) is None  # not named, not ignored, not quantized


def test_one_expression_stands_for_all_blocks() -> None:
    specs = {f"model.layers.{i}.mlp.experts.{e}.up_proj": spec() for i in range(30) for e in range(64)}
    (group,) = quantization_config(specs)["config_groups"].values()
    assert group["targets"] == [r"re:(model\.)?layers\.\d+\.mlp\.experts\.\d+\.up_proj$"]


def test_whole_rows_join_the_groups_as_wide_as_they_are() -> None:
    specs = {"a.0.q": spec(group=32, n=64), "a.0.k": spec(group=32, n=32), "a.0.v": spec(group=64, n=64)}
    groups = quantization_config(specs)["config_groups"]
    assert [(g["weights"]["strategy"], g["weights"]["group_size"]) for g in groups.values()] == [
        ("group", 32),
        ("channel", None),
    ]
    assert groups["group_0"]["targets"] == [r"re:a\.\d+\.q$", r"re:a\.\d+\.k$"]


def test_what_its_readers_would_mix_up_is_refused() -> None:
    experts = {"model.layers.0.mlp.experts.0.up_proj": spec(4), "model.layers.0.mlp.experts.1.up_proj": spec(3)}
    with pytest.raises(UserError, match="experts with different grids"):
        quantization_config(experts)
    with pytest.raises(UserError, match="expect all experts"):
        quantization_config({"model.layers.0.self_attn.q_proj": spec()}, experts)
    with pytest.raises(ValueError, match="trit-planes"):
        quantization_config({"a.b": spec() | {"format": "trit-planes"}})
    with pytest.raises(ValueError, match="no module"):
        quantization_config({}, ["lm_head"])


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_specs_come_back_from_config_and_headers(tmp_path: Path, asymmetric: bool) -> None:
    made = make(tmp_path, llama(torch.bfloat16), lambda module: mixed(module) | {"asymmetric": asymmetric})
    shapes = {name: entry["shape"] for name, entry in made.specs.items()}
    assert is_group_int(made.config())
    assert group_int_specs(made.config(), made.headers, shapes, "bfloat16") == made.specs
    resaved = QuantizationConfig.model_validate(made.config()).model_dump()
    assert group_int_specs(resaved, made.headers, shapes, "bfloat16") == made.specs


def test_experts_are_found_under_the_names_of_their_files() -> None:
    config = quantization_config({"model.layers.0.mlp.experts.0.gate_proj": spec(4, group=8)})
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    parts = {"packed": ("int32", (8, 4)), "scale": ("bfloat16", (8, 4)), "shape": ("int64", (2,))}
    headers = {f"{name}.weight_{part}": entry for part, entry in parts.items()}
    assert group_int_specs(config, headers, {name: (8, 32)}, "bfloat16") == {name: spec(4, group=8)}


def test_folders_that_are_something_else_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path, llama(torch.bfloat16), mixed)
    config, shapes = made.config(), {name: entry["shape"] for name, entry in made.specs.items()}
    assert not is_group_int({"quant_method": "gptq", "bits": 4})
    activations = {"g": {"targets": ["Linear"], "weights": {}, "input_activations": {"num_bits": 8}}}
    assert not is_group_int(config | {"config_groups": activations})
    with pytest.raises(UserError, match="quantized by gptq"):
        group_int_specs({"quant_method": "gptq"}, made.headers, shapes, "bfloat16")
    with pytest.raises(UserError, match="no group"):
        group_int_specs(config | {"config_groups": {}}, made.headers, shapes, "bfloat16")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with pytest.raises(UserError, match=f"has no {name}"):
        group_int_specs(config, {k: v for k, v in made.headers.items() if k != name}, shapes, "bfloat16")
    with pytest.raises(UserError, match=f"{name} is float16"):
        group_int_specs(config, made.headers | {name: ("float16", (172, 2))}, shapes, "bfloat16")
