"""Same inputs, same bytes: run twice, on one thread or two, in one chain or by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

WEIGHTS = "model.safetensors"


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for two threads to share the work."""
    model = tiny_models.random_model("llama", hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "wider")


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize(
    "stage",
    [
        {"method": "sparsegpt", "sparsity": 0.5},
        {"method": "sparsegpt", "pattern": "2:4", "refit": True},
        {"method": "admm", "sparsity": 0.6, "iterations": 30},
        {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
        {"method": "sparsegpt", "sparsity": 0.5, "bits": 3},
    ],
    ids=lambda stage: "-".join(map(str, stage.values())),
)
def test_threads_do_not_matter(stage: dict[str, Any], wider: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(calibration, stage)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tiny_models.run_recipe(recipe, wider, tmp_path / str(threads))
    assert weights(tmp_path / "1") == weights(tmp_path / "2")
    assert (tmp_path / "1" / "config.json").read_bytes() == (tmp_path / "2" / "config.json").read_bytes()


def test_twice_is_the_same_and_nothing_global_is_touched(
    llama: Path, calibration: Path, heldout: Path, tmp_path: Path
) -> None:
    evaluation = {"texts": [str(heldout)], "windows": 4}
    recipe = tiny_models.recipe_for(calibration, {"method": "sparsegpt"}, evaluation=evaluation)
    before, default = torch.random.get_rng_state(), torch.get_default_dtype()
    source = tiny_models.digest(llama)
    reports = [tiny_models.run_recipe(recipe, llama, tmp_path / name) for name in ("a", "b")]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == default
    assert tiny_models.digest(llama) == source
    a, b = (tiny_models.digest(tmp_path / name) for name in ("a", "b"))
    differing = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    assert differing <= {"report.json", "report.html", "README.md"}  # times of day
    assert reports[0].evaluation == reports[1].evaluation
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_chain_by_recipe_is_the_chain_by_hand(
    family: str, method: str, llama: Path, calibration: Path, tmp_path: Path
) -> None:
    model = tiny_models.random_model(family, dtype=torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "model")
    first, second = ({"method": method, "sparsity": sparsity} for sparsity in (0.4, 0.6))
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, first, second), source, tmp_path / "chain")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, first), source, tmp_path / "first")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, second), tmp_path / "first", tmp_path / "second")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "chain" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude", "admm"])
def test_a_pattern_after_a_sparsity_keeps_its_zeros(
    method: str, refit: bool, llama: Path, calibration: Path, tmp_path: Path
) -> None:
    first = {"method": "magnitude", "sparsity": 0.4}
    second = {"method": method, "pattern": "2:4", **({"refit": True} if refit else {})}
    for name, stages in (("first", [first]), ("both", [first, second])):
        tiny_models.run_recipe(tiny_models.recipe_for(calibration, *stages, save="dense"), llama, tmp_path / name)
    one, both = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "both"))
    for name, weight in one.items():
        if "_proj" in name:
            assert not bool(both[name][weight == 0].any())
            assert int((both[name].view(-1, 4) != 0).sum(1).max()) == 2


def test_zeros_of_the_first_stage_stay_zeros(llama: Path, calibration: Path, tmp_path: Path) -> None:
    first, second = {"method": "magnitude", "sparsity": 0.3}, {"method": "sparsegpt", "sparsity": 0.6}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, first, save="dense"), llama, tmp_path / "first")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, first, second, save="dense"), llama, tmp_path / "both")
    one, both = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "both"))
    for name, weight in one.items():
        if "_proj" in name:
            assert not bool(both[name][weight == 0].any())
            assert int((both[name] == 0).sum()) == pytest.approx(0.6 * weight.numel(), abs=1)


def test_sparse_integers_of_a_half_precision_model_reload(calibration: Path, tmp_path: Path) -> None:
    """Their values are rounded to the checkpoint's dtype when they are read: the run has to compute with these."""
    source = tiny_models.save(tiny_models.random_model("llama", dtype=torch.bfloat16), tmp_path / "model")
    stage = {"method": "sparsegpt", "sparsity": 0.5, "bits": 4}
    report = tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), source, tmp_path / "out")
    ids = tiny_models.random_ids(2)
    plain = tiny_models.recipe_for(calibration, stage, save="dense")
    tiny_models.run_recipe(plain, source, tmp_path / "dense")
    assert report.layers[0].format == "sparse-int"
    assert torch.equal(
        tiny_models.streamed_logits(tmp_path / "out", ids), tiny_models.streamed_logits(tmp_path / "dense", ids)
    )
