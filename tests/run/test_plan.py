"""The plan against what a run really does; sparsities, allocation, and stages that cannot be."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from compressor.errors import UserError
from compressor.run.stream import foresee

EXACT: list[dict[str, Any]] = [
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.37},
    {"method": "sparsegpt", "sparsity": 0.5},
    {"method": "sparsegpt", "sparsity": 0.37, "block": 10},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "magnitude", "pattern": "3:8"},
    {"method": "sparsegpt", "sparsity": 0.5, "bits": 4},
    {"method": "magnitude", "sparsity": 0.05, "include": ["mlp"], "exclude": ["up_proj"]},
]
CLOSE: list[dict[str, Any]] = [
    {"method": "wanda", "sparsity": 0.47},
    {"method": "admm", "sparsity": 0.61, "iterations": 20},
    {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
]


@pytest.mark.parametrize("stage", EXACT + CLOSE, ids=str)
def test_the_plan_predicts_the_bytes(stage: dict[str, Any], llama: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(calibration, stage)
    _, plan = foresee(recipe, str(llama))
    report = tiny_models.run_recipe(recipe, llama, tmp_path / "out")
    real = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.size.output_bytes == real
    assert plan.output_bytes == (real if stage in EXACT else pytest.approx(real, rel=0.01))
    assert report.size.disk_bytes >= real
    layers = {layer.name: layer for layer in report.layers}
    chosen = {linear.name for linear in plan.targets[0]}
    assert {name for name, layer in layers.items() if layer.method != "kept"} == chosen
    if (target := stage.get("sparsity")) and "bits" not in stage:
        zeros = sum(layers[name].sparsity * prod(layers[name].shape) for name in chosen)
        total = sum(prod(layers[name].shape) for name in chosen)
        assert zeros / total == pytest.approx(target, abs=0.002)


def test_dense_output_has_the_bytes_of_the_source(llama: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(None, {"method": "magnitude"}, save="dense")
    _, plan = foresee(recipe, str(llama))
    report = tiny_models.run_recipe(recipe, llama, tmp_path / "out")
    assert plan.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert not list((tmp_path / "out").glob("*.py"))
    assert {(layer.format, layer.bits_per_weight) for layer in report.layers} == {("float32", 32.0)}
    assert {layer.sparsity for layer in report.layers} == {0.5}
    assert report.size.bits_per_weight_linears == 32.0
    compressed = sum(row.bytes for row in report.size.ledger if row.group == "compressed linears")
    kept = sum(row.bytes for row in report.size.ledger if row.group == "kept linears")
    assert sum(layer.bytes for layer in report.layers) == compressed + kept


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_every_group_of_a_pattern_keeps_that_many(method: str, llama: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(calibration, {"method": method, "pattern": "2:4"}, save="dense")
    tiny_models.run_recipe(recipe, llama, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            kept = (module.weight.view(-1, 4) != 0).sum(1)
            assert bool((kept == 2).all()), name


def test_a_pattern_that_does_not_divide_is_refused(llama: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(None, {"method": "magnitude", "pattern": "3:5"})
    _, plan = foresee(recipe, str(llama))
    assert any("3:5" in line and "32" in line for line in plan.violations)
    with pytest.raises(UserError, match="3:5 does not divide the 32 inputs"):
        tiny_models.run_recipe(recipe, llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_filters_that_leave_nothing_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 14 linears"):
        tiny_models.run_recipe(
            tiny_models.recipe_for(None, {"method": "magnitude", "include": ["nope"]}), llama, tmp_path / "out"
        )


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_owl_keeps_the_mean(target: float, calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", num_hidden_layers=4)
    with torch.no_grad():  # outliers in the later blocks
        for number, block in enumerate(model.model.layers):
            block.mlp.up_proj.weight[:, 3] *= 1 + 10 * number
    source = tiny_models.save(model, tmp_path / "model")
    stage = {"method": "magnitude", "sparsity": target, "allocation": "owl", "owl_threshold": 3.0}
    report = tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), source, tmp_path / "out")
    zeros, sizes = defaultdict(float), defaultdict(int)
    for layer in report.layers:
        zeros[layer.block] += layer.sparsity * prod(layer.shape)
        sizes[layer.block] += prod(layer.shape)
    rounding = len(report.layers) / 2  # each matrix has a whole number of zeros
    assert abs(sum(zeros.values()) - target * sum(sizes.values())) <= rounding
    shares = [zeros[block] / sizes[block] for block in sorted(sizes)]
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=0.005)


def test_stages_on_compressed_inputs(llama: Path, calibration: Path, tmp_path: Path) -> None:
    codes = tiny_models.recipe_for(calibration, {"method": "sparsegpt", "sparsity": 0.5, "bits": 4})
    tiny_models.run_recipe(codes, llama, tmp_path / "codes")
    with pytest.raises(UserError, match="already quantized"):
        tiny_models.run_recipe(
            tiny_models.recipe_for(None, {"method": "magnitude", "sparsity": 0.7}), tmp_path / "codes", tmp_path / "x"
        )
    half = tiny_models.recipe_for(None, {"method": "magnitude", "sparsity": 0.5})
    tiny_models.run_recipe(half, llama, tmp_path / "half")
    for stage in ({"sparsity": 0.5}, {"sparsity": 0.3}):
        with pytest.raises(UserError, match="already pruned to 50"):
            tiny_models.run_recipe(
                tiny_models.recipe_for(None, {"method": "magnitude", **stage}), tmp_path / "half", tmp_path / "x"
            )
    tiny_models.run_recipe(
        tiny_models.recipe_for(None, {"method": "magnitude", "pattern": "2:4"}), tmp_path / "half", tmp_path / "nm"
    )
    assert not (tmp_path / "x").exists()


def test_matrices_left_alone_stay_as_they_were_packed(llama: Path, tmp_path: Path) -> None:
    half = tiny_models.recipe_for(None, {"method": "magnitude", "sparsity": 0.5})
    tiny_models.run_recipe(half, llama, tmp_path / "half")
    more = {"method": "magnitude", "sparsity": 0.6, "include": ["mlp"]}
    report = tiny_models.run_recipe(tiny_models.recipe_for(None, more), tmp_path / "half", tmp_path / "more")
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.6 if "mlp" in layer.name else 0.5, abs=1e-3)
        assert layer.method == ("magnitude" if "mlp" in layer.name else "kept")
    dense = tiny_models.recipe_for(None, more, save="dense")
    tiny_models.run_recipe(dense, tmp_path / "half", tmp_path / "dense")
    ids = tiny_models.random_ids(2)
    plain, packed = (tiny_models.stock_logits(tmp_path / name, ids) for name in ("dense", "more"))
    torch.testing.assert_close(plain, packed, rtol=1e-5, atol=1e-5)


def test_a_rank_at_which_nothing_gets_smaller_is_refused(tmp_path: Path) -> None:
    """Before anything is read; the limits that are told are those at which it begins to pay."""
    recipe = tiny_models.recipe_for(None, {"decompose": {"method": "svd", "rank": 10000}})
    _, plan = foresee(recipe, "embedded")
    assert plan.violations == (
        "rank 10000 makes none of the 21 matrices smaller: it pays for 256 x 128 up to rank 85, 128 x 128 up to rank "
        "63, 128 x 256 up to rank 85; --rank 85 at most, or --keep-params 0.8",
    )
    with pytest.raises(UserError, match="none of the 21 matrices"):
        tiny_models.run_recipe(recipe, Path("embedded"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    alone = {"decompose": {"method": "svd", "rank": 64, "include": ["0.self_attn.k_proj"]}}
    (told,) = foresee(tiny_models.recipe_for(None, alone), "embedded")[1].violations
    assert told.startswith("rank 64 makes no matrix smaller") and "128 x 128 up to rank 63" in told
    kept = {"decompose": {"method": "corda", "rank": 10000}}  # beside its residual nothing gets smaller anyway
    assert foresee(tiny_models.recipe_for(None, kept), "embedded")[1].violations == ()


def test_matrices_that_a_rank_leaves_whole_are_told_of(tmp_path: Path) -> None:
    for rank, whole in ((63, 0), (64, 6), (85, 6)):
        recipe = tiny_models.recipe_for(None, {"decompose": {"method": "svd", "rank": rank}})
        _, plan = foresee(recipe, "embedded")
        assert not plan.violations and len(plan.specs) == 21 - whole
        told = (
            f"rank {rank} makes 6 of 21 matrices no smaller, and these stay whole: it pays for 128 x 128 up to rank 63"
        )
        assert plan.notes == ((told,) if whole else ())
    report = tiny_models.run_recipe(recipe, Path("embedded"), tmp_path / "out")
    assert told in report.warnings
    assert sum(layer.method == "kept" for layer in report.layers) == 6
