"""Decomposing whole models: what is written, what loads it, budgets, chains, architectures, the same bytes again."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.cli.explain import summary
from compressor.engine.backward import loss_backward
from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.formats import Dense, GroupInt, LowRank, Sum
from compressor.report.comparison import read_entries
from compressor.report.contents import read_contents
from compressor.report.environment import plain
from compressor.report.footprint import has_products, stored_parameters
from compressor.report.numbers import ABSENT, parameters_text
from compressor.report.sentences import classes_told
from compressor.report.side_by_side import figures
from compressor.run import gates, gates_paper, rank_survey, stream
from compressor.run.export_dense import export_dense
from compressor.run.recipe import make_recipe

STAGES: list[dict[str, Any]] = [
    {"method": "svd"},
    {"method": "svd", "rank": 5},
    {"method": "svd", "ranks": "welore"},
    {"method": "welore", "keep_params": 0.7},
    {"method": "asvd"},
    {"method": "corda", "rank": 6, "residual": False},
    {"method": "svd-llm"},
    {"method": "svd-llm", "fit": "paper"},
    {"method": "svd-llm", "rank": 7},
    {"method": "svd-llm", "fit": "paper", "refit": True},
    {"method": "svd-llm", "ranks": "welore", "weighting": "output", "in_order": False},
    {"method": "svd-llm", "dense_share": 0.5, "drift": 0.0, "rounds": 1},
    {"method": "svd-llm", "factor_bits": 8, "keep_params": 0.5},
    {"method": "svd-llm", "joint": True, "rounds": 2, "keep_params": 0.5},
    {"method": "svd-llm", "joint": True, "factor_bits": 8, "keep_params": 0.3, "rounds": 1},
    {"method": "svd-llm", "factor_bits": 4, "keep_params": 0.4, "weighting": "output"},
    {"method": "svd", "factor_bits": 4, "keep_params": 0.4},
    {"method": "dobi", "steps": 3, "rounds": 1},
    {"method": "dobi", "fit": "paper", "steps": 2, "rounds": 1},
]


def name_of(stage: dict[str, Any]) -> str:
    return "-".join(map(str, stage.values()))


def same_both_ways(folder: Path) -> None:
    """Transformers, which multiplies by one factor after the other, and the engine, which merges them, agree."""
    ids = tiny_models.random_ids(2)
    stock, streamed = tiny_models.stock_logits(folder, ids), tiny_models.streamed_logits(folder, ids)
    assert float((stock - streamed).abs().max()) <= 0.02 * float(streamed.abs().max())


def decomposed(stage: dict[str, Any], calibration: Path, **content: Any) -> Any:
    return tiny_models.recipe_for(calibration, {"decompose": stage}, **content)


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_reloaded_weights_are_those_of_the_run(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run computed with is what the engine reads back, transformers has its logits, the budget is kept."""
    installed: dict[str, torch.Tensor] = {}
    original = stream.BlockRunner.set_weight

    def remember(self: Any, name: str, value: torch.Tensor) -> None:
        installed[name] = value.clone()
        original(self, name, value)

    monkeypatch.setattr(stream.BlockRunner, "set_weight", remember)
    tiny_models.run_recipe(decomposed(stage, calibration), half, tmp_path / "out")
    same_both_ways(tmp_path / "out")
    skeleton = build_skeleton(open_checkpoint(tmp_path / "out"))
    assert skeleton.packed and {spec["format"] for spec in skeleton.packed.values()} == {"low-rank"}
    whole = kept = 0.0
    for linear in skeleton.linears:
        (m, n), share = linear.shape, stage.get("factor_bits", 16) / 16
        whole += m * n
        if linear.name not in skeleton.packed:
            kept += m * n
            continue
        assert torch.equal(skeleton.read(f"{linear.name}.weight"), installed[f"{linear.name}.weight"])
        code = skeleton.representation(linear.name)
        assert isinstance(code, LowRank)
        borrowed = code.shared is not None
        assert "joint" in stage or code.rank * (m + n) * share < m * n
        kept += code.rank * (m if borrowed else m + n) * share
        if "rank" in stage:
            assert code.rank == stage["rank"]
    if "rank" not in stage:
        asked = stage.get("keep_params", 0.8)
        assert asked - 0.1 < kept / whole <= asked  # a component is a large part of so small a matrix
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "gpt2", "neox", "opt", "qwen3_moe"])
def test_every_architecture(family: str, calibration: Path, tmp_path: Path) -> None:
    """Biases, fused and transposed matrices, experts; loaded back by a fresh process."""
    model = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    recipe = decomposed({"method": "svd-llm", "keep_params": 0.6, "rounds": 1}, calibration, verify=True)
    report = tiny_models.run_recipe(recipe, model, tmp_path / "out")
    assert report.verification is not None and report.verification.passed
    assert any(layer.format == "low-rank" for layer in report.layers)


def test_the_budget_is_met_within_half_a_percent(calibration: Path, tmp_path: Path) -> None:
    """In parameters and in bytes of the files, on a model where a component is little."""
    model = tiny_models.random_model("llama", hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "model")
    for ranks in ("uniform", "energy", "welore"):
        recipe = decomposed({"method": "svd-llm", "ranks": ranks, "keep_params": 0.7, "rounds": 1}, calibration)
        report = tiny_models.run_recipe(recipe, source, tmp_path / ranks)
        linears = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        kept = sum(layer.bytes for layer in report.layers) / 2 / linears
        assert 0.7 - (0.005 if ranks != "uniform" else 0.02) < kept <= 0.7
    wanted = int(0.8 * source.joinpath("model.safetensors").stat().st_size)
    recipe = decomposed({"method": "svd-llm", "target_size": f"{wanted}B", "rounds": 1}, calibration)
    report = tiny_models.run_recipe(recipe, source, tmp_path / "sized")
    assert abs(report.size.weights_bytes - wanted) <= 0.005 * wanted


RESIDUALS: list[dict[str, Any]] = [
    {"method": "corda", "rank": 5},
    {"method": "corda", "components": "smallest", "rank": 30},  # more than the narrowest matrix has
    {"method": "svd", "residual": True},
    {"method": "svd-llm", "residual": True, "rank": 4},
]


@pytest.mark.parametrize("stage", RESIDUALS, ids=name_of)
def test_product_and_residual_are_the_source_to_one_rounding(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path
) -> None:
    """Every matrix is a sum, of the rank that was asked for; the plan knows its bytes; nothing is changed."""
    recipe = decomposed(stage, calibration, verify=True)
    _, plan = stream.foresee(recipe, str(half))
    report = tiny_models.run_recipe(recipe, half, tmp_path / "out")
    assert report.verification is not None and report.verification.passed
    assert plan.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.baseline is None  # nothing was saved that could be saved otherwise
    source, result = (build_skeleton(open_checkpoint(folder)) for folder in (half, tmp_path / "out"))
    rounding = torch.finfo(torch.bfloat16).eps / 2
    for linear in source.linears:
        code, weight = result.representation(linear.name), source.read(f"{linear.name}.weight").float()
        assert isinstance(code, Sum) and isinstance(code.base, Dense)
        assert code.base.weight.dtype == torch.bfloat16
        assert code.correction.rank == min(stage.get("rank", 16), *linear.shape)
        assert float(code.correction.dense().abs().max()) > 0
        slack = 1e-6 * float(weight.abs().max())
        assert bool(((code.dense() - weight).abs() <= rounding * code.base.weight.float().abs() + slack).all())


@pytest.mark.parametrize("components", ["largest", "smallest"])
def test_the_product_holds_the_components_by_cordas_definition(
    components: str, calibration: Path, tmp_path: Path
) -> None:
    """The SVD of W C, with C the second moment of the input: U_k S_k V_k^T C^-1, as published."""
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "model")
    recipe = decomposed({"method": "corda", "rank": 4, "components": components}, calibration)
    tiny_models.run_recipe(recipe, source, tmp_path / "out")
    runner = tiny_models.open_runner(source)
    inputs = runner.start(stream.load_inputs(*_plan_of(recipe, source)).calibration.ids).states
    x = runner.load_block(0).input_layernorm(inputs).flatten(0, -2).detach().double()
    C = x.T @ x / len(x)
    skeletons = [build_skeleton(open_checkpoint(folder)) for folder in (source, tmp_path / "out")]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        W = skeletons[0].read(f"{name}.weight").double()
        U, s, V = torch.linalg.svd(W @ C, full_matrices=False)
        chosen = slice(0, 4) if components == "largest" else slice(len(s) - 4, len(s))
        wanted = (U[:, chosen] * s[chosen]) @ V[chosen] @ torch.linalg.inv(C)
        code = skeletons[1].representation(name)
        assert isinstance(code, Sum)
        product = code.correction.dense(torch.float64)
        assert float((product - wanted).norm()) <= 2e-2 * float(wanted.norm())
        other = (U[:, :4] * s[:4] if components == "smallest" else U[:, -4:] * s[-4:]) @ (
            V[:4] if components == "smallest" else V[-4:]
        )
        assert float((product - other @ torch.linalg.inv(C)).norm()) > 0.5 * float(wanted.norm())


def _plan_of(recipe: Any, source: Path) -> Any:
    _, plan = stream.foresee(recipe, str(source))
    return plan, str(source), False, stream.quiet()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_joint_products_share_a_factor(family: str, calibration: Path, tmp_path: Path) -> None:
    """Stored once, beside the first; loaded by both ways in, and left alone by later stages."""
    model = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    out = tmp_path / "out"
    recipe = decomposed({"method": "svd-llm", "keep_params": 0.5, "joint": True, "rounds": 1}, calibration)
    tiny_models.run_recipe(recipe, model, out)
    skeleton = build_skeleton(open_checkpoint(out))
    shared = {name: spec["shared"] for name, spec in skeleton.packed.items() if "shared" in spec}
    assert shared and all(".experts." not in name for name in shared)
    stored = load_file(out / "model.safetensors")
    for name, owner in shared.items():
        assert not [part for part in stored if part.startswith(f"{name}.weight_right")]
        mine, other = skeleton.representation(name), skeleton.representation(owner)
        assert isinstance(mine, LowRank) and isinstance(other, LowRank)
        assert torch.equal(mine.right.dense(torch.float32), other.right.dense(torch.float32))
    ids = tiny_models.random_ids(2)
    assert torch.allclose(tiny_models.stock_logits(out, ids), tiny_models.streamed_logits(out, ids), atol=2e-3)
    stage = {"quantize": {"method": "rtn", "include": [next(iter(shared.values())).rpartition(".")[2]]}}
    _, plan = stream.foresee(make_recipe({"stages": [stage]}), str(out))
    with pytest.raises(UserError, match="shares a factor"):
        plan.refuse()


def test_joint_products_copied_and_merged(half: Path, calibration: Path, tmp_path: Path) -> None:
    """Copies of a loaded model, dequantized models, and exports know of the shared factor."""
    out = tmp_path / "out"
    stage = {"method": "svd-llm", "keep_params": 0.5, "joint": True, "rounds": 1}
    tiny_models.run_recipe(decomposed(stage, calibration), half, out)
    model, ids = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), tiny_models.random_ids(2)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        twin = copy.deepcopy(model)
        for module in model.modules():
            for part in [part for name, part in module.named_buffers(recurse=False) if name.startswith("weight_right")]:
                part.zero_()  # the copy has its own
        assert torch.equal(twin(input_ids=ids, use_cache=False).logits, wanted)
        assert not torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
        merged = twin.dequantize()
        assert torch.allclose(merged(input_ids=ids, use_cache=False).logits, wanted, atol=0.05)
    export_dense(str(out), tmp_path / "plain", verify=False)
    assert torch.allclose(tiny_models.stock_logits(tmp_path / "plain", ids), wanted, atol=0.05)


def test_what_no_rank_makes_smaller_stays_whole(half: Path, calibration: Path, tmp_path: Path) -> None:
    report = tiny_models.run_recipe(decomposed({"method": "svd", "rank": 15}, calibration), half, tmp_path / "out")
    formats = {tuple(layer.shape): layer.format for layer in report.layers}
    assert formats[(32, 32)] == "low-rank" and formats[(16, 32)] == "bfloat16"
    assert any("stays whole" in note for layer in report.layers for note in layer.notes)


def output_error(source: Path, result: Path, name: str, x: torch.Tensor) -> torch.Tensor:
    """Mean error of a linear's output (m,) on inputs ``x`` (tokens, n), biases included."""
    outs = []
    for folder in (source, result):
        skeleton = build_skeleton(open_checkpoint(folder))
        weight, bias = skeleton.read(f"{name}.weight"), skeleton.read(f"{name}.bias")
        outs.append(x @ weight.T + bias)
    return (outs[1] - outs[0]).mean(0)


def test_biases_make_up_for_the_mean(calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first matrices of a model see the same inputs before and after: their mean output stays."""
    source = tiny_models.save(tiny_models.random_model("qwen2"), tmp_path / "model")
    stage = {"method": "svd-llm", "rank": 3, "weighting": "output"}
    ids: list[torch.Tensor] = []
    original = stream.load_inputs

    def remember(*given: Any) -> Any:
        found = original(*given)
        ids.append(found.calibration.ids)
        return found

    monkeypatch.setattr(stream, "load_inputs", remember)
    errors = {}
    for bias in (True, False):
        out = tmp_path / str(bias)
        tiny_models.run_recipe(decomposed({**stage, "bias": bias}, calibration), source, out)
        runner = tiny_models.open_runner(source)
        inputs = runner.start(ids[0]).states
        x = runner.load_block(0).input_layernorm(inputs).flatten(0, -2).detach()
        errors[bias] = output_error(source, out, "model.layers.0.self_attn.q_proj", x).norm()
    assert errors[True] < 1e-3 * errors[False]


def test_loss_weighted_ranks_beat_uniform_ones_where_layers_differ(tmp_path: Path, calibration: Path) -> None:
    """A block whose output nothing looks at loses its components first."""
    model = tiny_models.random_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{name}").weight.mul_(1e-3)
    source = tiny_models.save(model, tmp_path / "model")
    out = tmp_path / "out"
    tiny_models.run_recipe(decomposed({"method": "svd-llm", "keep_params": 0.7}, calibration), source, out)
    skeleton = build_skeleton(open_checkpoint(out))

    def kept(block: int) -> float:
        ranks = [
            skeleton.packed[x.name]["left"]["shape"][1] / min(x.shape) if x.name in skeleton.packed else 1.0
            for x in skeleton.linears
            if x.block == block
        ]
        return sum(ranks) / len(ranks)

    assert kept(1) < 0.5 * min(kept(0), kept(2))


def test_chains_by_recipe_and_by_hand_give_the_same_bytes(half: Path, calibration: Path, tmp_path: Path) -> None:
    """prune, then decompose, then quantize the factors; what stays whole keeps its zeros."""
    stages = [
        {"prune": {"method": "magnitude", "sparsity": 0.3}},
        {"decompose": {"method": "svd", "rank": 15}},
        {"quantize": {"method": "rtn", "bits": 4, "group": 16}},
    ]
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, *stages), half, tmp_path / "chain")
    at = half
    for number, stage in enumerate(stages):
        tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), at, tmp_path / f"hand{number}")
        at = tmp_path / f"hand{number}"
    chain, hand = (load_file(folder / "model.safetensors") for folder in (tmp_path / "chain", at))
    assert chain.keys() == hand.keys() and all(torch.equal(chain[name], hand[name]) for name in chain)
    skeleton = build_skeleton(open_checkpoint(at))
    for linear in skeleton.linears:
        code = skeleton.representation(linear.name)
        if isinstance(code, LowRank):
            assert isinstance(code.left, GroupInt) and isinstance(code.right, GroupInt)
        else:
            assert float((code.dense() == 0).float().mean()) >= 0.3


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "trit-planes", "pb-llm", "ptq161"])
def test_any_method_quantizes_factors(method: str, half: Path, calibration: Path, tmp_path: Path) -> None:
    """In its own code, of which the plan knows the bytes; a fresh process has the run's logits."""
    quantize: dict[str, Any] = {"method": method} | ({} if method == "ptq161" else {"group": 16})
    stages = [{"decompose": {"method": "svd", "rank": 10}}, {"quantize": quantize}]
    recipe = tiny_models.recipe_for(calibration, *stages)
    report = tiny_models.run_recipe(recipe, half, tmp_path / "out")
    same_both_ways(tmp_path / "out")
    _, plan = stream.foresee(recipe, str(half))
    assert abs(plan.tensor_bytes - report.size.weights_bytes) <= 0.05 * report.size.weights_bytes
    codes = {
        spec[side]["format"]
        for spec in build_skeleton(open_checkpoint(tmp_path / "out")).packed.values()
        if spec["format"] == "low-rank"
        for side in ("left", "right")
    }
    expected = {"trit-planes": "trit-planes", "pb-llm": "partial-binary", "ptq161": "scaled-binary"}
    assert codes == {expected.get(method, "group-int")}


def test_factors_are_quantized_on_their_inputs(half: Path, calibration: Path, tmp_path: Path) -> None:
    """GPTQ on the factors does better at the output than rounding them, and a fresh process agrees."""
    errors = {}
    for method in ("gptq", "rtn"):
        stages = [
            {"decompose": {"method": "svd-llm", "rank": 10}},
            {"quantize": {"method": method, "bits": 3, "group": 16}},
        ]
        recipe = tiny_models.recipe_for(calibration, *stages)
        report = tiny_models.run_recipe(recipe, half, tmp_path / method)
        errors[method] = [layer.relative_error for layer in report.layers]
    assert all(error is not None for error in errors["gptq"])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"decompose": {"method": "svd"}}, {"prune": {"method": "magnitude"}}], "cannot follow"),
        ([{"decompose": {"method": "svd"}}, {"decompose": {"method": "svd"}}], "cannot follow"),
        ([{"decompose": {"method": "svd"}}, {"quantize": {"method": "flexround"}}], "learning does not"),
        ([{"decompose": {"method": "svd"}}, {"quantize": {"method": "gptq", "correct": 4}}], "no correction"),
        (
            [{"prune": {"method": "wanda"}}, {"decompose": {"method": "svd"}}, {"quantize": {"method": "pb-llm"}}],
            "keep their zeros",
        ),
        ([{"decompose": {"method": "svd", "factor_bits": 8}}, {"quantize": {"method": "rtn"}}], "integers already"),
        ([{"quantize": {"method": "rtn"}}, {"decompose": {"method": "svd"}}], "codes are final"),
        ([{"decompose": {"method": "svd", "rank": 4, "keep_params": 0.5}}], "exclude each other"),
        ([{"decompose": {"method": "svd-llm", "rank": 4, "ranks": "energy"}}], "give one"),
        ([{"decompose": {"method": "svd", "target_size": "lots"}}], "750MB"),
        ([{"decompose": {"method": "svd", "keep_params": 1.5}}], "less than 1"),
        ([{"decompose": {"method": "svd", "ranks": "energy"}}], "ranks"),
        ([{"decompose": {"method": "welore", "rank": 3}}], "welore chooses"),
        ([{"decompose": {"method": "svdllm"}}], "svd-llm"),
        ([{"decompose": {"method": "svd-llm", "joint": True, "ranks": "uniform"}}], "ranks energy"),
        ([{"decompose": {"method": "svd-llm", "joint": True}}, {"quantize": {"method": "rtn"}}], "factors are shared"),
        ([{"decompose": {"method": "corda", "keep_params": 0.5}}], "keep_params is no budget"),
        ([{"decompose": {"method": "corda", "target_size": "5MB"}}], "target_size is no budget"),
        ([{"decompose": {"method": "corda", "factor_bits": 8}}], "factor_bits 8"),
        ([{"decompose": {"method": "corda", "residual": False, "components": "smallest"}}], "alone are no model"),
        ([{"decompose": {"method": "svd", "components": "largest"}}], "components"),
        ([{"decompose": {"method": "dobi", "residual": True}}], "ranks dobi has no budget"),
        ([{"decompose": {"method": "svd-llm", "residual": True, "ranks": "energy"}}], "ranks energy has no budget"),
        ([{"decompose": {"method": "corda"}}, {"quantize": {"method": "gptq"}}], "for fine-tuning"),
        ([{"decompose": {"method": "corda", "overrides": {"q_proj": {"residual": False}}}}], "whole stage"),
        ([{"decompose": {"method": "svd-llm", "overrides": {"q_proj": {"drift": 0.1}}}}], "whole stage"),
    ],
)
def test_impossible_recipes_are_refused(stages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_recipe({"stages": stages})


@pytest.mark.parametrize(
    ("size", "said"), [("1KB", "less than"), ("1GB", "no less than"), ("{outer}B", "one component for every matrix")]
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_read(size: str, said: str, half: Path) -> None:
    checkpoint = open_checkpoint(half)
    skeleton = build_skeleton(checkpoint)
    rest = checkpoint.nbytes - sum(2 * linear.shape[0] * linear.shape[1] for linear in skeleton.linears)
    stage = {"method": "svd", "target_size": size.format(outer=rest + 100)}
    recipe = make_recipe({"stages": [{"decompose": stage}]})
    _, plan = stream.foresee(recipe, str(half))
    with pytest.raises(UserError, match=said):
        plan.refuse()


def test_decomposed_models_are_not_decomposed_again(half: Path, calibration: Path, tmp_path: Path) -> None:
    tiny_models.run_recipe(decomposed({"method": "svd"}, calibration), half, tmp_path / "once")
    for stage in ({"decompose": {"method": "svd"}}, {"prune": {"method": "magnitude"}}):
        _, plan = stream.foresee(make_recipe({"stages": [stage]}), str(tmp_path / "once"))
        with pytest.raises(UserError, match="already decomposed"):
            plan.refuse()


def test_what_stands_beside_its_residual_is_not_worked_on(half: Path, calibration: Path, tmp_path: Path) -> None:
    tiny_models.run_recipe(decomposed({"method": "corda"}, calibration), half, tmp_path / "once")
    for stage in ({"decompose": {"method": "svd"}}, {"quantize": {"method": "rtn"}}):
        _, plan = stream.foresee(make_recipe({"stages": [stage]}), str(tmp_path / "once"))
        with pytest.raises(UserError, match="compressor adapter"):
            plan.refuse()


def test_welores_classes_are_told(half: Path, tmp_path: Path) -> None:
    """In the notes of every matrix, counted in the report and on the card; not where other rules choose."""
    stage = {"method": "welore", "keep_params": 0.95, "exclude": ["o_proj"]}
    report = tiny_models.run_recipe(decomposed(stage, tmp_path), half, tmp_path / "out")
    classes = {layer.name: layer.component for layer in report.layers}
    for layer in report.layers:
        if layer.kind == "self_attn.o_proj":
            assert layer.component is None and not layer.notes
            continue
        assert layer.component == ("LRC" if layer.format == "low-rank" else "N-LRC")
        assert layer.notes[0].endswith(f"({layer.component})")
    counts = [list(classes.values()).count(kind) for kind in ("LRC", "N-LRC")]
    assert min(counts) > 0
    told = classes_told(report)
    assert told is not None and [int(word) for word in told.split() if word.isdigit()] == counts
    assert told in (tmp_path / "out" / "README.md").read_text()
    plain = tiny_models.run_recipe(decomposed({"method": "svd"}, tmp_path), half, tmp_path / "plain")
    assert classes_told(plain) is None and {layer.component for layer in plain.layers} == {None}


def test_the_plan_knows_the_bytes(half: Path, calibration: Path, tmp_path: Path) -> None:
    """Exactly where shapes decide, nearly where ranks are still to be chosen."""
    for stage, slack in (({"method": "svd"}, 0.0), ({"method": "svd-llm", "rounds": 1}, 0.05)):
        recipe = decomposed(stage, calibration)
        _, plan = stream.foresee(recipe, str(half))
        report = tiny_models.run_recipe(recipe, half, tmp_path / stage["method"])
        assert abs(plan.tensor_bytes - report.size.weights_bytes) <= slack * report.size.weights_bytes


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the survey and the first block: neither is done again."""
    recipe = decomposed({"method": "svd-llm", "rounds": 2, "keep_params": 0.7}, calibration)
    tiny_models.run_recipe(recipe, half, tmp_path / "whole")

    original = stream.decompose_block

    def dying(run: Any, number: int, block: int, *rest: Any) -> Any:
        if block == 1:
            raise Killed
        return original(run, number, block, *rest)

    monkeypatch.setattr(stream, "decompose_block", dying)
    with pytest.raises(Killed):
        tiny_models.run_recipe(recipe, half, tmp_path / "out")
    monkeypatch.setattr(stream, "decompose_block", original)
    monkeypatch.setattr(rank_survey, "_measure", None)  # would be an error to call
    report = tiny_models.run_recipe(recipe, half, tmp_path / "out")
    assert report.resumed is not None and report.resumed.blocks == 1
    files = [folder / "model.safetensors" for folder in (tmp_path / "whole", tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_learned_positions_are_never_worse_than_where_they_began(
    half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the windows held out; steps that lead away are forgotten."""
    judged: list[float] = []
    found: list[list[Any]] = []
    original_loss, original = gates.loss_only, rank_survey.learn_gates

    def remember_loss(*given: Any) -> float:
        judged.append(original_loss(*given))
        return judged[-1]

    def remember(run: Any, scratch: Path, linears: Any, parts: Any, ranks: Any, room: Any, steps: int) -> Any:
        found.extend([list(ranks), original(run, scratch, linears, parts, ranks, room, steps)])
        return found[-1]

    monkeypatch.setattr(gates, "loss_only", remember_loss)
    monkeypatch.setattr(rank_survey, "learn_gates", remember)
    monkeypatch.setattr(gates, "RATE", 5.0)  # leads away at once
    stage = {"method": "dobi", "steps": 2, "rounds": 1, "keep_params": 0.6}
    tiny_models.run_recipe(decomposed(stage, calibration), half, tmp_path / "out")
    assert len(judged) == 2  # where it began, and after the last step
    assert (found[1] == found[0]) == (judged[1] >= judged[0])


def test_gradients_of_published_positions_are_those_of_the_loss(tmp_path: Path) -> None:
    """Against finite differences through the whole model; biases are not truncated."""
    source = tiny_models.save(tiny_models.random_model("qwen2"), tmp_path / "model")
    runner = tiny_models.open_runner(source)
    runner.load_outer()
    linears = [x for x in runner.skeleton.linears if x.kind in ("self_attn.q_proj", "mlp.down_proj")]
    ids = tiny_models.random_ids(2)
    positions = torch.full((len(linears),), 6.52, requires_grad=True)

    def loss(at: torch.Tensor) -> float:
        with gates_paper.truncating(runner.skeleton.model, linears, lambda i: at[i]):
            return loss_backward(runner, runner.start(ids), tmp_path, weights=lambda block: {})

    loss(positions)
    assert positions.grad is not None
    found = positions.grad / (ids.shape[0] * (ids.shape[1] - 1))
    step = 0.01
    for i in range(len(linears)):
        moved = step * torch.eye(len(linears))[i]
        difference = (loss(positions.detach() + moved) - loss(positions.detach() - moved)) / (2 * step)
        assert float(found[i]) == pytest.approx(difference, rel=0.05, abs=2e-5)
    assert float(found.abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "opt"])
def test_published_positions_of_every_kind_of_layer(family: str, calibration: Path, tmp_path: Path) -> None:
    """Experts, which get few tokens or none, transposed layers, inputs without a dimension of windows."""
    model = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    stage = {"method": "dobi", "fit": "paper", "steps": 1, "rounds": 1, "keep_params": 0.6}
    report = tiny_models.run_recipe(decomposed(stage, calibration), model, tmp_path / "out")
    linears = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert {layer.format for layer in report.layers} <= {"low-rank", "float32"}
    assert 0.45 < sum(layer.bytes for layer in report.layers if layer.format == "low-rank") / 2 / linears <= 0.6


SCRIPT = """
import sys, torch, tiny_models
from pathlib import Path
torch.set_num_threads(int(sys.argv[1]))
model, calibration, output = map(Path, sys.argv[2:])
stage = {"decompose": {"method": "dobi", "steps": 2, "rounds": 1, "keep_params": 0.6}}
tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), model, output)
"""


def test_the_same_bytes_on_one_thread_and_on_two(calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for threads in ("1", "2"):
        arguments = [sys.executable, "-c", SCRIPT, threads, str(source), str(calibration), str(tmp_path / threads)]
        subprocess.run(arguments, check=True, env=environment, capture_output=True)
    files = [tmp_path / threads / "model.safetensors" for threads in ("1", "2")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "svd", "keep_params": 0.5},
        {"method": "svd-llm", "joint": True, "rounds": 1, "keep_params": 0.4},
        {"method": "corda", "rank": 6},
    ],
    ids=name_of,
)
def test_card_report_and_explain_count_the_parameters_that_are_stored(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path
) -> None:
    """Those of the factors, as whoever adds up the tensors of the file finds them; and so does what is made of it."""
    report = tiny_models.run_recipe(decomposed(stage, calibration), half, tmp_path / "out")
    counted = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    before, after = stored_parameters(report)
    assert (before, after) == (report.model.parameters, counted)
    assert (counted > before) == (stage["method"] == "corda") and has_products(report)
    contents = read_contents(tmp_path / "out")
    assert (contents.parameters, contents.stored_parameters) == (before, counted)
    assert f"{parameters_text(counted)} parameters, which stand for" in summary(contents)[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| parameters | {before:,} | {counted:,} |" in card and "| parameters | of the source |" in card
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<td class="n">{plain(counted)}</td><td class="n">{plain(before)}</td>' in page
    (row,) = [row for row in figures([entry_of(tmp_path / "out"), entry_of(half)]) if row.name == "parameters"]
    assert [cell.words for cell in row.cells] == [f"{counted:,}", ABSENT]
    if stage["method"] == "svd":
        codes = tiny_models.recipe_for(None, {"quantize": {"method": "rtn", "group": 8}})
        again = tiny_models.run_recipe(codes, tmp_path / "out", tmp_path / "codes")
        assert stored_parameters(again) == (counted, counted), "its source has the factors' parameters already"
        assert f"| parameters | {counted:,} | {counted:,} |" in (tmp_path / "codes" / "README.md").read_text()


def entry_of(folder: Path) -> Any:
    return read_entries([folder, folder])[0]
