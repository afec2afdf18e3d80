"""Every supported architecture, as a tiny random model of its real class: the engine computes what transformers
computes, and what it prunes loads back and says the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.engine import forward
from compressor.engine.observe import observe
from compressor.hf.experts import unfuse
from compressor.methods.masks import count
from compressor.methods.statistics import InputStatistics
from compressor.report.schema import Report

TOLERANCE = 1e-5
FAMILIES = list(tiny_models.FAMILIES)
VERIFIED = ("llama", "qwen3_moe")  # in a fresh process as well: it costs seconds
SHARED = {  # linears of a block that read the same input; every other one has an input of its own
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "phi3": [],
    "gpt2": [],
    "neox": [],
    "opt": [{"q_proj", "k_proj", "v_proj"}],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.random_model(family)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / family)


@pytest.fixture(scope="module")
def packed(family: str, source: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("packed") / family
    recipe = tiny_models.recipe_for(calibration, {"method": "sparsegpt", "sparsity": 0.5}, verify=family in VERIFIED)
    return output, tiny_models.run_recipe(recipe, source, output)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "batch_tokens", lambda _: 2 * tiny_models.LENGTH)  # 5 windows: 2, 2 and 1


@pytest.mark.usefixtures("small_batches")
def test_streamed_logits_are_those_of_the_stock_model(source: Path) -> None:
    ids = tiny_models.random_ids(5)
    expected = tiny_models.stock_logits(source, ids)
    assert expected.std() > 0.05  # a model whose logits say something
    torch.testing.assert_close(tiny_models.streamed_logits(source, ids), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.usefixtures("small_batches")
def test_statistics_are_the_sum_over_all_tokens(family: str, source: Path) -> None:
    ids = tiny_models.random_ids(5)
    expected = _slow_statistics(source, ids)
    runner = tiny_models.open_runner(source)
    stream = runner.start(ids)
    for block in range(2):
        linears = [linear for linear in runner.skeleton.linears if linear.block == block]
        runner.load_block(block)
        seen = observe(runner, block, linears, stream)
        runner.step(block, stream)
        runner.release_block(block)
        for linear in linears:
            hessian, tokens = expected[linear.name]
            assert seen.statistics[linear.name].tokens == tokens, linear.name
            scale = float(hessian.abs().max()) or 1.0
            torch.testing.assert_close(
                seen.statistics[linear.name].hessian.double() / scale, hessian / scale, rtol=0, atol=1e-6
            )
        _check_sharing(family, seen.statistics)


@torch.no_grad()
def _slow_statistics(folder: Path, ids: Tensor) -> dict[str, tuple[Tensor, int]]:
    """sum x x^T in fp64 and tokens for every linear in the blocks of the stock model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    unfuse(model)
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook(name: str, width: int) -> Any:
        def gather(_: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, width).double()
            hessian, tokens = sums[name]
            sums[name] = hessian + rows.T @ rows, tokens + len(rows)

        return gather

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and re.search(r"\.\d+\.", name):
            width = module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
            sums[name] = torch.zeros(width, width, dtype=torch.float64), 0
            module.register_forward_pre_hook(hook(name, width))
    model(input_ids=ids, use_cache=False)
    return sums


def _check_sharing(family: str, statistics: dict[str, InputStatistics]) -> None:
    groups: dict[int, set[str]] = {}
    for name, each in statistics.items():
        if ".experts." in name:
            expert, leaf = name.rsplit(".", 1)
            partner = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(leaf)
            if partner:
                assert each is statistics[f"{expert}.{partner}"], name
        groups.setdefault(id(each), set()).add(re.sub(r"^.*?experts\.", "", name.split(".", 3)[-1]))
    found = [{name.rsplit(".", 1)[-1] for name in group} for group in groups.values() if len(group) > 1]
    if family not in ("qwen3_moe", "mixtral"):
        expected = SHARED.get(family, SHARED["llama"])
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    else:
        assert {"q_proj", "k_proj", "v_proj"} in found


def test_pruned_model_loads_and_says_what_the_engine_says(
    family: str, source: Path, packed: Any, calibration: Path, tmp_path: Path
) -> None:
    output, report = packed
    ids = tiny_models.random_ids(3, seed=7)
    streamed = tiny_models.streamed_logits(output, ids)
    torch.testing.assert_close(tiny_models.stock_logits(output, ids), streamed, rtol=TOLERANCE, atol=TOLERANCE)
    recipe = tiny_models.recipe_for(calibration, {"method": "sparsegpt", "sparsity": 0.5}, save="dense")
    tiny_models.run_recipe(recipe, source, tmp_path / "dense")
    dense = tiny_models.stock_logits(tmp_path / "dense", ids)
    torch.testing.assert_close(dense, streamed, rtol=TOLERANCE, atol=TOLERANCE)
    assert _names(tmp_path / "dense") == _names(source)
    changed = (dense - tiny_models.stock_logits(source, ids)).abs().max()
    assert changed > 1e-3
    if family in VERIFIED:
        assert report.verification is not None and report.verification.passed
        assert report.verification.max_abs_difference < 1e-4


def test_packed_models_can_be_pruned_further_and_made_plain_again(source: Path, packed: Any, tmp_path: Path) -> None:
    more = {"method": "magnitude", "sparsity": 0.6}
    for save in ("packed", "dense"):
        tiny_models.run_recipe(tiny_models.recipe_for(None, more, save=save), packed[0], tmp_path / save)
    assert _names(tmp_path / "dense") == _names(source)
    ids = tiny_models.random_ids(2)
    expected = tiny_models.streamed_logits(tmp_path / "packed", ids)
    for save in ("packed", "dense"):
        logits = tiny_models.stock_logits(tmp_path / save, ids)
        torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_exactly_half_of_every_matrix_is_zero(packed: Any) -> None:
    output, report = packed
    model: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    modules = dict(model.named_modules())
    for layer in report.layers:
        weight = modules[layer.name].unpacked()
        assert tuple(weight.shape) == tuple(layer.shape)
        assert int((weight == 0).sum()) == count(0.5, weight.numel()) == round(layer.sparsity * weight.numel())
    compressed = {layer.name for layer in report.layers}
    linears = {name for name, module in modules.items() if type(module).__name__ in ("Linear", "Conv1D")}
    assert not linears & compressed
    assert all(name == "lm_head" or name.endswith("embed_out") or ".gate" in name for name in linears), linears


def test_tied_embeddings_are_stored_once_and_untouched(source: Path, packed: Any) -> None:
    output, report = packed
    before, after = _outer(source), _outer(output)
    assert sorted(map(str, before.values())) == sorted(map(str, after.values()))
    heads = [name for name in after if "lm_head" in name or "embed_out" in name]
    embeddings = [name for name in after if re.search("embed_tokens|wte|embed_in", name)]
    assert len(embeddings) == 1
    assert len(heads) == (0 if report.model.tied_embeddings else 1)


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def _outer(folder: Path) -> dict[str, list[float]]:
    """Tensors outside the blocks: name -> values of its corner."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if not re.search(r"\.\d+\.", name)]  # noqa: SIM118
        return {name: file.get_tensor(name).reshape(-1)[:8].tolist() for name in names}


@pytest.fixture
def router_without_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """The routers send the tokens of expert 5 to expert 6."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

    plain = Router.forward

    def detour(self: Any, hidden_states: Tensor) -> Any:
        logits, weights, chosen = plain(self, hidden_states)
        return logits, weights, torch.where(chosen == 5, 6, chosen)

    monkeypatch.setattr(Router, "forward", detour)


@pytest.mark.usefixtures("router_without_5")
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_starved_experts_fall_back_and_are_named(method: str, calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("qwen3_moe"), tmp_path / "moe")
    recipe = tiny_models.recipe_for(calibration, {"method": method, "sparsity": 0.5})
    report = tiny_models.run_recipe(recipe, source, tmp_path / "out")
    _check_experts(report)
    assert bool(torch.isfinite(tiny_models.stock_logits(tmp_path / "out", tiny_models.random_ids(2))).all())


def _check_experts(report: Report) -> None:
    assert report.calibration is not None
    routed = {(e.module, e.expert): e.tokens for e in report.experts}
    assert len(routed) == 2 * 8
    assert all(tokens == 0 for (_, expert), tokens in routed.items() if expert == 5)
    for module in {module for module, _ in routed}:
        # two experts for each token
        assert sum(t for (m, _), t in routed.items() if m == module) == 2 * report.calibration.tokens
    starved = [e for e in report.experts if e.expert == 5]
    assert all(e.fallback and "magnitude" in e.fallback for e in starved)
    for e in starved:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"{e.module}.5.{leaf}"
            assert any(line.startswith(name + ":") for line in report.fallbacks), name
            layer = next(layer for layer in report.layers if layer.name == name)
            assert layer.sparsity == 0.5 and layer.fallback
    assert not [e for e in report.experts if e.fallback and e.tokens > 100]
