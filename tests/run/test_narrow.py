"""Narrowing whole models: what stock transformers loads, what the cache takes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed
from transformers import AutoModelForCausalLM

from compressor.errors import UserError
from compressor.hf.caches import cache_name
from compressor.run import stream
from compressor.run.recipe import make_recipe

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "neox", "opt"]


def narrowed(calibration: Path, *, verify: bool = True, **content: Any) -> Any:
    stage = {"method": "transact", **content}
    return tiny_models.recipe_for(calibration, {"decompose": stage}, verify=verify)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_fewer_neurons(family: str, calibration: Path, tmp_path: Path) -> None:
    """The model's own class; a fresh process has found the logits of the run."""
    source = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    report = tiny_models.run_recipe(narrowed(calibration, mlp=0.75), source, tmp_path / "out")
    assert report.verification is not None and report.verification.passed
    assert report.verification.route == "stock transformers"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    assert config["model_type"] == before["model_type"] and "quantization_config" not in config
    field = "ffn_dim" if family == "opt" else "intermediate_size"
    assert (config[field] == 36 and before[field] in (48, 128)) or config[field] == 0.75 * before[field]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = sum(parameter.numel() * parameter.itemsize for parameter in set(model.parameters()))
    assert report.size.weights_bytes == pytest.approx(stored, rel=0.001)
    assert report.size.kv_bytes_per_token == report.size.source_kv_bytes_per_token


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_cache_shrinks_with_the_values(family: str, calibration: Path, tmp_path: Path) -> None:
    """By what the report says, in the real cache; biases of values included."""
    source = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    report = tiny_models.run_recipe(narrowed(calibration, mlp=0.9, values=0.5), source, tmp_path / "out")
    assert report.verification is not None and report.verification.passed
    caches = {}
    for name, folder in (("before", source), ("after", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        out = model.generate(tiny_models.random_ids(1), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        layers = getattr(out, cache_name(type(model))).layers
        tokens = layers[0].keys.shape[-2]
        caches[name] = sum(x.numel() * x.itemsize for layer in layers for x in (layer.keys, layer.values)) // tokens
    assert report.size.kv_bytes_per_token == caches["after"] < caches["before"] == report.size.source_kv_bytes_per_token
    assert caches["after"] == 0.75 * caches["before"]
    assert "bytes of cache instead of" in (tmp_path / "out" / "README.md").read_text()


def test_the_share_of_parameters_is_what_was_asked_for(calibration: Path, tmp_path: Path) -> None:
    """Neurons make up for what values leave."""
    source = tiny_models.save(tiny_models.random_model("llama", intermediate_size=240), tmp_path / "model")
    for values in (1.0, 0.5):
        out = tmp_path / str(values)
        report = tiny_models.run_recipe(
            narrowed(calibration, verify=False, keep_params=0.7, values=values), source, out
        )
        layers = [x for x in report.layers if "mlp" in x.name or "v_proj" in x.name or "o_proj" in x.name]
        whole = sum(x.shape[0] * x.shape[1] for x in layers)
        assert sum(x.bytes for x in layers) / 4 / whole == pytest.approx(0.7, abs=0.005)
    tiny_models.run_recipe(narrowed(calibration, verify=False, keep_params=0.7, multiple=16), source, tmp_path / "m")
    width = json.loads((tmp_path / "m" / "config.json").read_text())["intermediate_size"]
    assert width % 16 == 0


def test_the_result_can_be_narrowed_and_compressed_again(calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "model")
    tiny_models.run_recipe(narrowed(calibration, verify=False, mlp=0.9, values=0.75), source, tmp_path / "once")
    report = tiny_models.run_recipe(narrowed(calibration, mlp=0.8, values=0.5), tmp_path / "once", tmp_path / "twice")
    assert report.verification is not None and report.verification.passed
    recipe = tiny_models.recipe_for(calibration, {"quantize": {"method": "gptq", "group": 16}}, verify=True)
    report = tiny_models.run_recipe(recipe, tmp_path / "twice", tmp_path / "coded")
    assert report.verification is not None and report.verification.passed


@pytest.mark.parametrize(
    ("family", "stage", "said"),
    [
        ("gpt2", {}, "cannot be narrowed"),
        ("qwen3_moe", {}, "cannot be narrowed"),
        ("qwen3", {"values": 0.5}, "normalizes queries"),
        ("gemma2", {"values": 0.5}, "no class of transformers"),
        ("llama", {"keep_params": 0.01}, "no neuron"),
    ],
)
def test_what_no_stock_class_can_say_is_refused_before_the_work(
    family: str, stage: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    recipe = make_recipe({"stages": [{"decompose": {"method": "transact", **stage}}]})
    _, plan = stream.foresee(recipe, str(source))
    with pytest.raises(UserError, match=said):
        plan.refuse()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"decompose": {"method": "transact", "mlp": 1, "values": 1}}], "leave everything"),
        ([{"decompose": {"method": "transact", "mlp": 0.5, "keep_params": 0.5}}], "exclude each other"),
        ([{"decompose": {"method": "transact", "include": ["mlp"]}}], "same widths"),
        ([{"decompose": {"method": "transact", "rank": 4}}], "rank"),
        ([{"decompose": {"method": "transact", "residual": True}}], "residual"),
        ([{"decompose": {"method": "transact"}}, {"quantize": {"method": "gptq"}}], "only stage"),
        ([{"prune": {"method": "wanda"}}, {"decompose": {"method": "transact"}}], "only stage"),
    ],
)
def test_impossible_recipes_are_refused(stages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_recipe({"stages": stages})


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "model")
    recipe = narrowed(calibration, verify=False, mlp=0.8, values=0.5)
    tiny_models.run_recipe(recipe, source, tmp_path / "whole")
    original = stream.narrow_block

    def dying(run: Any, number: int, block: int, work: Any) -> None:
        if block == 1:
            raise Killed
        original(run, number, block, work)

    monkeypatch.setattr(stream, "narrow_block", dying)
    with pytest.raises(Killed):
        tiny_models.run_recipe(recipe, source, tmp_path / "out")
    monkeypatch.setattr(stream, "narrow_block", original)
    report = tiny_models.run_recipe(recipe, source, tmp_path / "out")
    assert report.resumed is not None and report.resumed.blocks == 1
    files = [folder / "model.safetensors" for folder in (tmp_path / "whole", tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
