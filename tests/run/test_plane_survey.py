"""``planes: auto``: the budget is kept and used, foreseen, resumed, and refused where it cannot be kept."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from compressor.errors import UserError
from compressor.run import stream
from compressor.run.recipe import make_stage


def stage(**more: Any) -> dict[str, Any]:
    return {"method": "trit-planes", "planes": "auto", "bpw": 4.5, "group": 16, "rounds": 1, **more}


def source_of(folder: Path) -> Path:
    """A model in whose first block the feed-forward part carries almost everything."""
    model = tiny_models.random_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(6)
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.02)
    return tiny_models.save(model, folder / "source")


def test_the_budget_is_kept_and_goes_where_it_matters(calibration: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    recipe = tiny_models.recipe_for(calibration, {"quantize": stage()}, verify=True)
    plan = stream.foresee(recipe, str(source))[1]
    report = tiny_models.run_recipe(recipe, source, tmp_path / "out")
    weights = sum(prod(layer.shape) for layer in report.layers)
    bits = 8 * sum(layer.bytes for layer in report.layers) / weights
    largest = max(prod(layer.shape) for layer in report.layers)
    assert 4.5 - 2 * 2.6 * largest / weights <= bits <= 4.5
    assert abs(plan.output_bytes - report.size.output_bytes) <= 2 * 2.6 * largest / 8
    most = {layer.name for layer in report.layers if layer.bits_per_weight > 7}
    assert "model.layers.0.mlp.down_proj" in most and "model.layers.0.self_attn.q_proj" not in most
    assert len({round(layer.bits_per_weight) for layer in report.layers}) > 1
    assert report.verification is not None and report.verification.passed


def test_numbers_given_for_single_matrices_stand(calibration: Path, tmp_path: Path) -> None:
    content = stage(overrides={"down_proj": {"planes": 1, "bpw": None}})
    report = tiny_models.run_recipe(
        tiny_models.recipe_for(calibration, {"quantize": content}), source_of(tmp_path), tmp_path / "out"
    )
    down = {round(layer.bits_per_weight, 1) for layer in report.layers if "down_proj" in layer.name}
    others = [layer for layer in report.layers if "down_proj" not in layer.name]
    assert len(down) == 1 and down.pop() < 3
    assert 8 * sum(x.bytes for x in others) / sum(prod(x.shape) for x in others) <= 4.5


def test_what_cannot_be_is_refused_before_anything_is_read(calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="planes auto needs a budget"):
        make_stage("quantize", {"method": "trit-planes", "planes": "auto"})
    with pytest.raises(UserError, match="bpw is the budget of planes auto"):
        make_stage("quantize", {"method": "trit-planes", "planes": 2, "bpw": 3.0})
    with pytest.raises(UserError, match="planes"):
        make_stage("quantize", {"method": "trit-planes", "planes": 4})
    recipe = tiny_models.recipe_for(calibration, {"quantize": stage(bpw=1.5)})
    with pytest.raises(UserError, match=r"one trit plane takes 2\.\d+ bits"):
        tiny_models.run_recipe(recipe, source_of(tmp_path), tmp_path / "out")
