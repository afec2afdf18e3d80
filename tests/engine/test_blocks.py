"""Corners of running and observing blocks: bad activations, experts fused on disk, models without a tokenizer, and a
written folder that is not what was computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from compressor.engine.observe import observe
from compressor.errors import UserError
from compressor.run import transform

HALF = {"method": "sparsegpt", "sparsity": 0.5}


def test_rows_that_are_not_finite_are_left_out_and_counted(llama: Path) -> None:
    runner = tiny_models.open_runner(llama)
    linears = [linear for linear in runner.skeleton.linears if linear.block == 0]
    clean, spoilt = (runner.start(tiny_models.random_ids(4)) for _ in range(2))
    spoilt.states[1, 3, 7] = float("nan")  # attention spreads it over window 1: 0 * NaN is NaN
    runner.load_block(0)
    seen, expected = (observe(runner, 0, linears, stream) for stream in (spoilt, clean))
    for linear in linears:
        name = linear.name
        first = name.endswith(("q_proj", "k_proj", "v_proj"))
        assert seen.bad_tokens[name] == (1 if first else tiny_models.LENGTH)
        assert seen.statistics[name].tokens + seen.bad_tokens[name] == expected.statistics[name].tokens
        assert bool(torch.isfinite(seen.statistics[name].hessian).all())
        assert set(seen.calls.values()) == {1}


def test_experts_fused_on_disk(calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("qwen3_moe")
    apart = tiny_models.save(model, tmp_path / "apart")
    tensors = load_file(apart / "model.safetensors")
    for block in range(2):
        prefix = f"model.layers.{block}.mlp.experts"
        experts = range(model.config.num_experts)
        take = {
            part: [tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in experts] for part in ("gate", "up", "down")
        }
        pairs = zip(take["gate"], take["up"], strict=True)
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}.down_proj"] = torch.stack(take["down"])
    fused = tiny_models.save(model, tmp_path / "fused")
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    ids = tiny_models.random_ids(3)
    assert torch.equal(tiny_models.streamed_logits(fused, ids), tiny_models.streamed_logits(apart, ids))
    packed = tiny_models.recipe_for(calibration, HALF)
    for source in (apart, fused):
        report = tiny_models.run_recipe(packed, source, tmp_path / f"{source.name}-packed")
        assert report.carried_over == []
    weights = [(tmp_path / f"{name}-packed" / "model.safetensors").read_bytes() for name in ("apart", "fused")]
    assert weights[0] == weights[1]
    dense = tiny_models.recipe_for(calibration, HALF, save="dense")
    tiny_models.run_recipe(dense, fused, tmp_path / "dense")
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in tensors.items()}
    again = tiny_models.streamed_logits(tmp_path / "dense", ids)
    expected = tiny_models.streamed_logits(tmp_path / "apart-packed", ids)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_no_tokenizer_is_needed_where_no_text_is(tmp_path: Path) -> None:
    tiny_models.random_model("gpt2", n_positions=16, max_position_embeddings=16).save_pretrained(tmp_path / "model")
    report = tiny_models.run_recipe(
        tiny_models.recipe_for(None, {"method": "magnitude"}), tmp_path / "model", tmp_path / "out"
    )
    assert report.calibration is None and any("nothing was evaluated" in line for line in report.warnings)


def test_names_of_the_original_gpt2_without_prefix(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("gpt2"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    ids = tiny_models.random_ids(2)
    torch.testing.assert_close(
        tiny_models.streamed_logits(source, ids), tiny_models.stock_logits(source, ids), rtol=1e-5, atol=1e-5
    )
    half = tiny_models.recipe_for(None, {"method": "magnitude"}, save="dense")
    report = tiny_models.run_recipe(half, source, tmp_path / "dense")
    assert report.carried_over == ["h.0.attn.bias"]
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == bare.keys()
    packed = tiny_models.recipe_for(None, {"method": "magnitude"})
    tiny_models.run_recipe(packed, source, tmp_path / "packed")
    logits = [tiny_models.stock_logits(tmp_path / name, ids) for name in ("dense", "packed")]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_calibration_on_the_models_own_words(llama: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(Path("self"), HALF)
    report = tiny_models.run_recipe(recipe, llama, tmp_path / "out")
    assert report.calibration is not None and report.calibration.sources[0]["name"] == "self"


def test_a_folder_that_does_not_say_what_was_computed_is_not_published(
    llama: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = transform.pack_block

    def spoilt(*args: Any) -> Any:
        specs, parts = plain(*args)
        for each in parts.values():
            each["values"] = each["values"] * 1.5
        return specs, parts

    monkeypatch.setattr("compressor.run.stream.pack_block", spoilt)
    recipe = tiny_models.recipe_for(calibration, HALF, verify=True)
    with pytest.raises(UserError, match="computes other logits"):
        tiny_models.run_recipe(recipe, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "model" / "model.safetensors").exists()
    assert capfd.readouterr().err == ""
    # The run can be taken up, and refuses again: nothing is published by trying twice.
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    assert len(journal["blocks"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes_are_kept(dtype: torch.dtype, calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("llama", dtype=dtype), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    save_file({**tensors, **norms}, source / "model.safetensors", metadata={"format": "pt"})
    ids = tiny_models.random_ids(2)
    for save in ("packed", "dense"):
        tiny_models.run_recipe(tiny_models.recipe_for(calibration, HALF, save=save), source, tmp_path / save)
        written = load_file(tmp_path / save / "model.safetensors")
        for name, tensor in written.items():
            kind = name.removesuffix("_values").removesuffix("_mask")
            expected = torch.float32 if "norm" in name else dtype
            assert tensor.dtype == (torch.uint8 if name.endswith("_mask") else expected), name
            assert kind in tensors
    packed, dense = (tiny_models.stock_logits(tmp_path / save, ids) for save in ("packed", "dense"))
    assert torch.equal(packed, dense)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_too(dtype: str, llama: Path, calibration: Path, heldout: Path, tmp_path: Path) -> None:
    evaluation = {"texts": [str(heldout)], "windows": 2}
    perplexities = {}
    for chosen in (dtype, "float32"):
        recipe = tiny_models.recipe_for(calibration, HALF, evaluation=evaluation, dtype=chosen)
        report = tiny_models.run_recipe(recipe, llama, tmp_path / chosen)
        assert report.evaluation[0].protocol["compute"] == chosen
        perplexities[chosen] = [row.perplexity for row in report.evaluation[0].rows]
    assert perplexities[dtype] == pytest.approx(perplexities["float32"], rel=0.05)
