"""Narrow models as stock transformers loads them: the same outputs as the model they came from, and smaller caches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.errors import UserError
from compressor.hf.caches import read_on
from compressor.hf.narrow import (
    CARRIER,
    check_values,
    head_dim,
    kv_bytes_per_token,
    mlp_names,
    narrow_config,
    value_dim,
)
from compressor.methods.narrowing import (
    expand_columns,
    expand_output,
    expand_rows,
    expand_values,
    narrow_values_of,
    project_columns,
)

SHARED = Path(__file__).parents[3] / "shared" / "models"
NARROWED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "neox", "opt"]
"""Tiny models whose MLPs can be narrowed."""
CARRIED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama of one head a value": {"num_key_value_heads": 4},
    "llama of wide heads": {"head_dim": 12},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "llama, llama3 positions": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama, yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16
        }
    },
    "llama, linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}  # fmt: skip


def tiny(family: str, **more: Any) -> Any:
    """A random model whose config was made with ``more``, so that what follows from it follows."""
    content = {**tiny_models.FAMILIES[family]().to_dict(), **more}
    config = AutoConfig.for_model(**content)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.15) if parameter.ndim > 1 else parameter.add_(
                    0.05 * torch.randn_like(parameter)
                )
    return model


def carried(name: str) -> Any:
    return tiny(name.split()[0].removesuffix(","), **CARRIED[name])


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


def built(content: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """The stock class that a config.json names, with all its weights from ``state``."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and {*missing.missing_keys} <= {"lm_head.weight"}
    model.tie_weights()
    return model


def narrow_attention(state: dict[str, Tensor], width: int, kv_heads: int, seed: int = 0) -> tuple[Any, Any]:
    """Value and output projections in random bases: (state of the narrow model, the same in the old shapes)."""
    narrow, expanded = dict(state), dict(state)
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in state if name.endswith("o_proj.weight")]:
        block = name.removesuffix("o_proj.weight")
        dim = len(state[f"{block}v_proj.weight"]) // kv_heads
        bases = torch.linalg.qr(torch.randn(kv_heads, dim, width, generator=generator)).Q
        narrow[name] = project_columns(state[name], bases)
        expanded[name] = expand_output(narrow[name], bases)
        for value in {f"{block}v_proj.weight", f"{block}v_proj.bias"} & state.keys():
            narrow[value] = narrow_values_of(state[value], bases)
            expanded[value] = expand_values(narrow[value], bases)
    return narrow, expanded


@pytest.mark.parametrize("name", CARRIED)
def test_the_carrier_computes_the_very_same_logits(name: str) -> None:
    model = carried(name)
    ids = tiny_models.random_ids(3, 40)
    content = narrow_config(model.config.to_dict(), model.config, values=[head_dim(model.config) - 1] * 2)
    assert content["model_type"] == CARRIER
    as_wide = built({**content, "v_head_dim": head_dim(model.config)}, model.state_dict())
    assert torch.equal(logits(as_wide, ids), logits(model, ids))


@pytest.mark.parametrize("name", CARRIED)
def test_narrow_values_give_what_the_model_gives_with_the_expanded_weights(name: str) -> None:
    model = carried(name)
    width, kv_heads = head_dim(model.config) - 3, model.config.num_key_value_heads
    narrow, expanded = narrow_attention(model.state_dict(), width, kv_heads)
    content = narrow_config(model.config.to_dict(), model.config, values=[width] * 2)
    ids = tiny_models.random_ids(3, 40)
    small = built(content, narrow)
    before = logits(model, ids)
    model.load_state_dict(expanded)
    torch.testing.assert_close(logits(small, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert (logits(small, ids) - before).abs().max() > 0.1


@pytest.mark.parametrize("family", NARROWED)
def test_narrow_mlps_are_the_models_own_class(family: str) -> None:
    model = tiny(family)
    names = mlp_names(model.config)
    neurons = getattr(model.config, names.field)
    kept = torch.arange(neurons)[torch.arange(neurons) % 3 > 0]
    rows = torch.cat([kept + part * neurons for part in range(names.stacked)])
    narrow, expanded = model.state_dict(), model.state_dict()
    for name in model.state_dict():
        module, _, kind = name.rpartition(".")
        if module.endswith(names.into):
            narrow[name], expanded[name] = narrow[name][rows], expand_rows(narrow[name][rows], rows, len(narrow[name]))
        elif module.endswith(names.out) and kind == "weight":
            narrow[name] = narrow[name][:, kept]
            expanded[name] = expand_columns(narrow[name], kept, neurons)
    content = narrow_config(model.config.to_dict(), model.config, mlp=[len(kept)] * 2)
    assert content["model_type"] == model.config.model_type and content[names.field] == len(kept)
    assert {key for key in content if content[key] != model.config.to_dict()[key]} == {names.field}
    small, ids = built(content, narrow), tiny_models.random_ids(3)
    model.load_state_dict(expanded)
    torch.testing.assert_close(logits(small, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_both_at_once_and_again() -> None:
    """What is narrow already can be narrowed further, in the same class."""
    model = tiny("qwen2")
    content = narrow_config(model.config.to_dict(), model.config, mlp=[40, 40], values=[6, 6])
    config = AutoConfig.for_model(**content)
    assert (config.intermediate_size, config.v_head_dim, config.head_dim, value_dim(config)) == (40, 6, 8, 6)
    again = narrow_config(content, config, mlp=[32, 32], values=[5, 5])
    assert again == {**content, "intermediate_size": 32, "v_head_dim": 5}
    only_mlp = narrow_config(content, config, mlp=[32, 32])
    assert only_mlp == {**content, "intermediate_size": 32}


def test_unchanged_values_need_no_other_class() -> None:
    model = tiny("llama")
    content = narrow_config(model.config.to_dict(), model.config, mlp=[40, 40], values=[8, 8])
    assert content["model_type"] == "llama"


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("llama", {"attention_bias": True}, "output projection has a bias"),
        ("llama", {"mlp_bias": True}, "MLPs have biases"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("mistral", {}, "sliding window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("qwen3", {}, "normalizes queries and keys"),
        ("gemma2", {}, "caps its scores"),
        ("phi3", {}, "known for llama, mistral, qwen2 only"),
        ("mixtral", {}, "known for llama"),
    ],
)
def test_what_the_carrier_cannot_say_is_refused(family: str, more: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(**{**tiny_models.FAMILIES[family]().to_dict(), **more})
    with pytest.raises(UserError, match=reason):
        check_values(config)
    if family != "mixtral":
        with pytest.raises(UserError, match=reason):
            narrow_config(config.to_dict(), config, values=[6, 6])


def test_mixtures_are_refused() -> None:
    for family in ("mixtral", "qwen3_moe", "gpt2"):
        with pytest.raises(UserError, match="cannot be narrowed"):
            mlp_names(tiny_models.FAMILIES[family]())
    config = AutoConfig.for_model(CARRIER)
    for check in (mlp_names, check_values):
        with pytest.raises(UserError, match="mixtures"):
            check(config)


@pytest.mark.parametrize("widths", [{"mlp": [40, 32]}, {"values": [6, 5]}])
def test_other_widths_in_other_layers_are_said_only_where_the_class_builds_them(widths: dict[str, list[int]]) -> None:
    """transformers 5.24 builds none of these; when a later one does, what it builds has to be what was asked for."""
    config = tiny("llama").config
    try:
        content = narrow_config(config.to_dict(), config, **widths)
    except UserError as error:
        assert "for all layers" in str(error)
        return
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    layers = model.model.layers
    if "mlp" in widths:
        assert [layer.mlp.down_proj.in_features for layer in layers] == widths["mlp"]
    else:
        assert [layer.self_attn.o_proj.in_features // 4 for layer in layers] == widths["values"]


def cache_bytes(model: Any, tokens: int) -> int:
    """What the real cache holds after ``tokens`` tokens."""
    with torch.no_grad():
        _, cache = read_on(model, None, input_ids=tiny_models.random_ids(1, tokens))
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "neox", "opt", "phi3"])
def test_bytes_of_the_cache_are_those_of_the_real_one(family: str) -> None:
    model = tiny(family)
    assert cache_bytes(model, 5) == 5 * kv_bytes_per_token(model.config, torch.float32)


def test_narrow_values_make_the_cache_smaller() -> None:
    model = tiny("llama")
    content = narrow_config(model.config.to_dict(), model.config, values=[4, 4])
    small = built(content, narrow_attention(model.state_dict(), 4, 2)[0])
    assert cache_bytes(small, 7) == 7 * kv_bytes_per_token(small.config, torch.float32)
    assert kv_bytes_per_token(small.config, torch.float16) == 2 * 2 * 2 * (8 + 4)
    assert kv_bytes_per_token(small.config, torch.float16) == 0.75 * kv_bytes_per_token(model.config, torch.float16)


def test_caches_of_other_kinds_are_not_guessed() -> None:
    with pytest.raises(UserError, match="not made of keys and values"):
        kv_bytes_per_token(AutoConfig.for_model("deepseek_v3"), torch.float16)


def write(folder: Path, content: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """A folder with nothing but stock files."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if content.get("tie_word_embeddings") else set()
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "compressor" not in sys.modules
ids = torch.tensor([[5, 6, 7, 8]])
out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=1)
cache = out["cache"] if "cache" in out else out["past_key_values"]
print([layer.values.shape[-1] for layer in cache.layers], out.sequences[0].tolist())
"""


def test_a_process_without_us_loads_and_generates(tmp_path: Path) -> None:
    model = tiny("llama")
    narrow, expanded = narrow_attention(model.state_dict(), 5, 2)
    content = narrow_config(model.config.to_dict(), model.config, values=[5, 5])
    folder = write(tmp_path / "narrow", content, narrow)
    done = subprocess.run([sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model.load_state_dict(expanded)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0].tolist()
    assert done.stdout.strip() == f"[5, 5] {expected}"
    assert not [line for line in done.stderr.splitlines() if "MISSING" in line or "UNEXPECTED" in line]


@pytest.mark.parametrize("name", ["stories260k-llama", "tinystories-656k-llama"])
def test_real_models_keep_their_logits_and_their_tokens(name: str, tmp_path: Path) -> None:
    source = SHARED / name
    if not (source / "tokenizer.json").exists():
        pytest.skip(f"there is no {source}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    width = head_dim(model.config)
    content = narrow_config(stored, model.config, values=[width - 1] * model.config.num_hidden_layers)
    folder = write(tmp_path / "wide", {**content, "v_head_dim": width}, model.state_dict())
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / file).exists():
            (folder / file).write_bytes((source / file).read_bytes())
    text = "Once upon a time, there was a little girl named Lily."
    before, after = (AutoTokenizer.from_pretrained(place)(text).input_ids for place in (source, folder))
    assert before == after
    ids = torch.tensor([before * 4])
    carrier = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits(carrier, ids), logits(model, ids))
