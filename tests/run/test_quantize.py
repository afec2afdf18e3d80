"""Quantizing whole models: what is written, what loads it, chains, overrides, learning, and the same bytes again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.formats import TritPlanes
from compressor.run import stream
from compressor.run.recipe import make_recipe

STAGES: list[dict[str, Any]] = [
    {"method": "rtn", "bits": 4, "group": 16},
    {"method": "rtn", "bits": 3, "group": 16, "asymmetric": True},
    {"method": "gptq", "bits": 3, "group": 16},
    {"method": "gptq", "bits": 8, "group": "row"},
    {"method": "trit-planes", "planes": 2, "group": 16},
    {"method": "trit-planes", "planes": 1, "fit": "paper", "group": 20},
    {"method": "flexround", "bits": 3, "group": 16, "tune_steps": 3},
    {"method": "awq", "bits": 3, "group": 16},
    {"method": "ptq161"},
    {"method": "ptq161", "fit": "paper", "salient": 0.4, "salient_bits": 8, "tune_steps": 3, "preprocess": 2},
    {"method": "rtn", "bits": 2, "group": 16, "correct": 3},
    {"method": "trit-planes", "planes": 1, "group": 16, "correct": 4, "correct_bits": 8},
    {"method": "pb-llm", "group": 16},
    {"method": "pb-llm", "group": 20, "salient": 0.14, "salient_bits": 4},
    {"method": "pb-llm", "group": 16, "mask": "column"},
    {"method": "pb-llm", "group": 16, "means": True},
    {"method": "pb-llm", "group": "row", "fit": "paper", "metric": "magnitude"},
]
STOCK = ("rtn", "gptq", "flexround", "awq")


def name_of(stage: dict[str, Any]) -> str:
    return "-".join(map(str, stage.values()))


def quantized(stage: dict[str, Any], calibration: Path, **content: Any) -> Any:
    return tiny_models.recipe_for(calibration, {"quantize": stage}, **content)


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_reloaded_weights_are_those_of_the_run(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what the run computed with is what the engine reads back, and a stock process has its logits."""
    installed: dict[str, torch.Tensor] = {}
    original = stream.BlockRunner.set_weight

    def remember(self: Any, name: str, value: torch.Tensor) -> None:
        installed[name] = value.clone()
        original(self, name, value)

    monkeypatch.setattr(stream.BlockRunner, "set_weight", remember)
    report = tiny_models.run_recipe(quantized(stage, calibration, verify=True), half, tmp_path / "out")
    assert report.verification is not None and report.verification.passed
    skeleton = build_skeleton(open_checkpoint(tmp_path / "out"))
    assert {linear.name for linear in skeleton.linears} == set(skeleton.packed)
    for linear in skeleton.linears:
        assert torch.equal(skeleton.read(f"{linear.name}.weight"), installed[f"{linear.name}.weight"])
        assert skeleton.stored(f"{linear.name}.weight")[0] == torch.bfloat16


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_bytes_on_disk_are_those_accounted_and_foreseen(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path
) -> None:
    recipe = quantized(stage, calibration)
    plan = stream.foresee(recipe, str(half))[1]
    report = tiny_models.run_recipe(recipe, half, tmp_path / "out")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert abs(on_disk - report.size.output_bytes) <= 0.01 * on_disk
    assert abs(on_disk - plan.output_bytes) <= 0.02 * on_disk
    stored = load_file(tmp_path / "out" / "model.safetensors")
    names = {layer.name for layer in report.layers}
    packed = sum(t.numel() * t.itemsize for name, t in stored.items() if name.rpartition(".weight_")[0] in names)
    assert packed == sum(layer.bytes for layer in report.layers)


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_integers_are_for_everybody_the_rest_is_ours(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path
) -> None:
    verified = stage["method"] in (
        "gptq",
        "trit-planes",
    )
    report = tiny_models.run_recipe(quantized(stage, calibration, verify=verified), half, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stock = stage["method"] in STOCK and not stage.get("asymmetric") and not stage.get("correct")
    assert config["model_type"] == ("llama" if stock else "compressor")
    assert (tmp_path / "out" / "modeling_compressor.py").exists() is not stock
    assert (report.verification is not None) is verified
    route = "stock transformers with compressed-tensors" if stock else "import compressor"
    assert report.verification is None or report.verification.route == route


def test_transposed_layers_stay_in_our_own_folder(calibration: Path, tmp_path: Path) -> None:
    """compressed-tensors knows nn.Linear alone, and GPT-2 has Conv1D."""
    source = tiny_models.save(tiny_models.random_model("gpt2"), tmp_path / "gpt2")
    recipe = quantized({"method": "gptq", "group": 16}, calibration, verify=True)
    report = tiny_models.run_recipe(recipe, source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "compressor"
    assert report.verification is not None and report.verification.passed


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "phi3", "neox"])
@pytest.mark.parametrize("method", ["gptq", "trit-planes", "awq", "pb-llm"])
def test_other_families_reload(family: str, method: str, calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    recipe = quantized({"method": method, "group": 16}, calibration, verify=True)
    report = tiny_models.run_recipe(recipe, source, tmp_path / "out")
    assert report.verification is not None and report.verification.passed


def test_save_dense_writes_the_rounded_values(half: Path, calibration: Path, tmp_path: Path) -> None:
    stage = {"method": "rtn", "bits": 3, "group": 16}
    tiny_models.run_recipe(quantized(stage, calibration, save="dense"), half, tmp_path / "dense")
    tiny_models.run_recipe(quantized(stage, calibration), half, tmp_path / "packed")
    ids = tiny_models.random_ids(2)
    assert torch.equal(
        tiny_models.streamed_logits(tmp_path / "dense", ids), tiny_models.streamed_logits(tmp_path / "packed", ids)
    )


@pytest.mark.parametrize("stage", [STAGES[2], STAGES[4], STAGES[6]], ids=name_of)
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "dense zeros"])
def test_pruned_weights_stay_zero(
    stage: dict[str, Any], plain: bool, half: Path, calibration: Path, tmp_path: Path
) -> None:
    pruning = tiny_models.recipe_for(calibration, {"method": "wanda"}, save="dense" if plain else "packed")
    tiny_models.run_recipe(pruning, half, tmp_path / "pruned")
    tiny_models.run_recipe(quantized(stage, calibration), tmp_path / "pruned", tmp_path / "out")
    before, after = (build_skeleton(open_checkpoint(tmp_path / name)) for name in ("pruned", "out"))
    for linear in before.linears:
        zero = before.read(f"{linear.name}.weight") == 0
        assert zero.float().mean() > 0.4
        assert not after.read(f"{linear.name}.weight")[zero].any()


@pytest.mark.parametrize("stage", [STAGES[6], STAGES[8]], ids=name_of)
def test_the_reader_file_alone_reads_signs(
    stage: dict[str, Any], llama: Path, calibration: Path, tmp_path: Path
) -> None:
    """The other loading route, in a process that never imports the package: the logits are the engine's."""
    tiny_models.run_recipe(quantized(stage, calibration), llama, tmp_path / "out")
    ids = tiny_models.random_ids(2)
    torch.save(ids, tmp_path / "ids.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/out", trust_remote_code=True)
assert not any(name.split(".")[0] == "compressor" for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1] + "/ids.pt")).logits, sys.argv[1] + "/logits.pt")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = tiny_models.streamed_logits(tmp_path / "out", ids)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_a_chain_by_recipe_is_the_chain_by_hand(half: Path, calibration: Path, tmp_path: Path) -> None:
    prune, trits = {"prune": {"method": "wanda"}}, {"quantize": {"method": "trit-planes", "group": 16}}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, prune, trits), half, tmp_path / "chain")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, prune), half, tmp_path / "first")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, trits), tmp_path / "first", tmp_path / "second")
    assert tiny_models.digest(tmp_path / "chain", "*.safetensors") == tiny_models.digest(
        tmp_path / "second", "*.safetensors"
    )


def test_overrides_are_for_the_modules_they_match(half: Path, calibration: Path, tmp_path: Path) -> None:
    stage = {"method": "trit-planes", "group": 16, "overrides": {"down_proj": {"planes": 3}, r"\.1\.": {"planes": 1}}}
    report = tiny_models.run_recipe(quantized(stage, calibration), half, tmp_path / "out")
    skeleton = build_skeleton(open_checkpoint(tmp_path / "out"))
    for linear in skeleton.linears:
        code = skeleton.representation(linear.name)
        assert isinstance(code, TritPlanes)
        expected = 3 if "down_proj" in linear.name else 1 if ".1." in linear.name else 2
        assert code.trits.shape[0] == expected, linear.name
    stages = report.recipe["stages"]
    assert stages[0]["quantize"]["overrides"] == {"down_proj": {"planes": 3}, r"\.1\.": {"planes": 1}}
    assert make_recipe({"stages": stages}).stages[0].overrides  # the written recipe can be run again


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"(": {"bits": 3}}, "not a regular expression"),
        ({"down_proj": {"bitz": 3}}, "'bits'"),
        ({"down_proj": {"include": ["x"]}}, "belongs to the whole stage"),
        ({"down_proj": 3}, "should look like"),
        ([1], "should look like"),
    ],
)
def test_wrong_overrides_are_refused(overrides: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_recipe({"stages": [{"quantize": {"method": "gptq", "overrides": overrides}}]})
    assert said in str(caught.value)


def test_inputs_that_drift_are_made_up_for(half: Path, calibration: Path, tmp_path: Path) -> None:
    """GPTAQ: other codes, of the same size; nothing has drifted in front of the first block."""
    stage = {"method": "gptq", "bits": 2, "group": 16}
    plain = tiny_models.run_recipe(quantized(stage, calibration), half, tmp_path / "plain")
    aimed = tiny_models.run_recipe(quantized({**stage, "drift": 0.5}, calibration), half, tmp_path / "aimed")
    assert aimed.size.weights_bytes == plain.size.weights_bytes
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "aimed"))
    first, second = (f"model.layers.{block}.self_attn.q_proj.weight_packed" for block in (0, 1))
    assert torch.equal(before[first], after[first])
    assert not torch.equal(before[second], after[second])


def test_codes_are_final(half: Path, calibration: Path, tmp_path: Path) -> None:
    gptq = {"quantize": {"method": "gptq", "group": 16}}
    with pytest.raises(UserError, match="codes are final"):
        tiny_models.recipe_for(calibration, gptq, {"prune": {"method": "wanda"}})
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, gptq), half, tmp_path / "out")
    for stage in (gptq, {"prune": {"method": "wanda"}}):
        with pytest.raises(UserError, match="already quantized"):
            tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("stage", "who", "what"),
    [
        ({"method": "pb-llm", "group": 16}, "pb-llm", "a sign"),
        ({"method": "ptq161"}, "ptq161", "a sign"),
        ({"method": "rtn", "group": 16, "correct": 2}, "a corrected code", "a sum"),
    ],
    ids=["pb-llm", "ptq161", "correct"],
)
def test_what_cannot_say_zero_is_refused_on_what_is_pruned(
    stage: dict[str, Any], who: str, what: str, half: Path, calibration: Path, tmp_path: Path
) -> None:
    prune, signs = {"prune": {"method": "wanda"}}, {"quantize": stage}
    with pytest.raises(UserError, match=f"{what} cannot say zero"):
        tiny_models.recipe_for(calibration, prune, signs)
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, prune), half, tmp_path / "pruned")
    with pytest.raises(UserError, match=f"{who} cannot say zero"):
        tiny_models.run_recipe(tiny_models.recipe_for(calibration, signs), tmp_path / "pruned", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LEARNED = [
    {"method": "rtn", "bits": 3, "group": 16, "tune_steps": 30, "tune_rate": 0.02},
    {"method": "trit-planes", "planes": 1, "group": 16, "tune_steps": 30, "tune_rate": 0.02},
    {"method": "awq", "bits": 3, "group": 16, "tune_steps": 30, "tune_rate": 0.02},
    {"method": "pb-llm", "group": 16, "tune_steps": 30, "tune_rate": 0.02},
    {"method": "ptq161", "tune_steps": 30, "tune_rate": 0.02},
    {"method": "gptq", "bits": 2, "group": 16, "correct": 4, "tune_steps": 30, "tune_rate": 0.02},
]


@pytest.mark.parametrize("stage", LEARNED, ids=name_of)
def test_learning_never_harms_held_out_windows_and_takes_no_byte(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path
) -> None:
    plain = tiny_models.run_recipe(quantized({**stage, "tune_steps": 0}, calibration), half, tmp_path / "plain")
    report = tiny_models.run_recipe(quantized(stage, calibration, verify=True), half, tmp_path / "tuned")
    # the masks of later blocks are others, behind other blocks, and do not pack to the very same bytes
    near = 0.001 if stage["method"] == "pb-llm" else 0
    assert report.size.weights_bytes == pytest.approx(plain.size.weights_bytes, rel=near, abs=0)
    assert report.verification is not None and report.verification.passed
    notes = {note for layer in report.layers for note in layer.notes if note.startswith("tuned")}
    assert len(notes) == 2  # one a block
    for note in notes:
        before, after = (float(word) for word in note.split("windows ")[1].split(" (")[0].split(" -> "))
        assert after <= before
    assert tiny_models.digest(tmp_path / "plain", "*.safetensors") != tiny_models.digest(
        tmp_path / "tuned", "*.safetensors"
    )


@pytest.mark.parametrize("stage", LEARNED, ids=name_of)
def test_killed_while_learning_and_resumed(
    stage: dict[str, Any], half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quantized(stage, calibration)
    tiny_models.run_recipe(recipe, half, tmp_path / "whole")
    calls = 0
    real = stream.tune_stage

    def dies(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(stream, "tune_stage", dies)
    with pytest.raises(KeyboardInterrupt):
        tiny_models.run_recipe(recipe, half, tmp_path / "out")
    report = tiny_models.run_recipe(recipe, half, tmp_path / "out")
    assert report.resumed is not None and report.resumed.blocks == 1
    assert calls == 3  # the first block was not learned again
    assert tiny_models.digest(tmp_path / "whole", "*.safetensors") == tiny_models.digest(
        tmp_path / "out", "*.safetensors"
    )


@pytest.mark.parametrize("stage", [STAGES[2], STAGES[4], STAGES[6], *LEARNED], ids=name_of)
def test_threads_do_not_matter(stage: dict[str, Any], calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "model")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tiny_models.run_recipe(quantized(stage, calibration), source, tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert tiny_models.digest(tmp_path / "1", "*.safetensors") == tiny_models.digest(tmp_path / "2", "*.safetensors")


def test_scales_are_folded_and_the_yardsticks_stay(
    half: Path, calibration: Path, heldout: Path, tmp_path: Path
) -> None:
    """Norms change on disk; the dense and the equal-bytes baseline streams are those of a run without scales."""
    evaluation = {"texts": [str(heldout)], "windows": 4}
    reports = {}
    for steps in (0, 20):
        stage = {"method": "awq", "bits": 3, "group": 16, "steps": steps}
        recipe = quantized(stage, calibration, verify=True, evaluation=evaluation)
        reports[steps] = tiny_models.run_recipe(recipe, half, tmp_path / str(steps))
        verification = reports[steps].verification
        assert verification is not None and verification.passed
    stored = {steps: load_file(tmp_path / str(steps) / "model.safetensors") for steps in reports}
    source = load_file(half / "model.safetensors")
    norms = [name for name in source if re.search(r"layers\.\d.*layernorm", name)]
    assert len(norms) == 4
    assert all(torch.equal(stored[0][name], source[name]) for name in norms)
    assert any(not torch.equal(stored[20][name], source[name]) for name in norms)
    rows = {steps: {row.label: row.perplexity for row in r.evaluation[0].rows} for steps, r in reports.items()}
    for label in rows[0]:
        assert (rows[0][label] == rows[20][label]) is not label.startswith("awq"), label
    errors = {steps: sum(layer.relative_error or 0 for layer in r.layers) for steps, r in reports.items()}
    assert 0 < errors[20] < 1.02 * errors[0]


def test_scales_survive_being_saved_dense(half: Path, calibration: Path, tmp_path: Path) -> None:
    stage = {"method": "awq", "bits": 3, "group": 16}
    tiny_models.run_recipe(quantized(stage, calibration, save="dense"), half, tmp_path / "dense")
    tiny_models.run_recipe(quantized(stage, calibration), half, tmp_path / "packed")
    ids = tiny_models.random_ids(2)
    assert torch.equal(
        tiny_models.streamed_logits(tmp_path / "dense", ids), tiny_models.streamed_logits(tmp_path / "packed", ids)
    )


def test_killed_between_scaled_blocks_and_resumed(
    half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quantized({"method": "awq", "bits": 3, "group": 16}, calibration)
    tiny_models.run_recipe(recipe, half, tmp_path / "whole")
    real = stream.fold_scales

    def dies(*args: Any) -> None:
        real(*args)
        if args[5] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "fold_scales", dies)
        tiny_models.run_recipe(recipe, half, tmp_path / "out")
    report = tiny_models.run_recipe(recipe, half, tmp_path / "out")
    assert report.resumed is not None and report.resumed.blocks == 1
    assert tiny_models.digest(tmp_path / "whole", "*.safetensors") == tiny_models.digest(
        tmp_path / "out", "*.safetensors"
    )


@pytest.mark.parametrize(
    ("method", "group", "stored", "label"),
    [
        ("rtn", 7, {4}, "rtn 4-bit g4"),
        ("gptq", 64, {64}, "gptq 4-bit g64"),
        ("rtn", 512, {128, 256}, "rtn 4-bit g128/256"),
        ("rtn", "row", {128, 256}, "rtn 4-bit by row"),
        ("trit-planes", 48, {48}, "trit-planes K=2 g48 data-free"),
    ],
)
def test_labels_say_the_groups_that_are_stored(
    method: str, group: Any, stored: set[int], label: str, tmp_path: Path
) -> None:
    how = {"fit": "data-free"} if method == "trit-planes" else {"refine": 0} if method == "gptq" else {}
    stage = {"quantize": {"method": method, "group": group, **how, "include": [r"layers\.0\.mlp"]}}
    evaluation = {"texts": ["embedded-heldout"], "windows": 2, "seqlen": 32, "samples": 0}
    calibration = {"nsamples": 4, "seqlen": 64}
    content = {"evaluation": evaluation, "calibration": calibration, "verify": False}
    recipe = make_recipe({"stages": [stage], **content})
    _, plan = stream.foresee(recipe, "embedded")
    report = tiny_models.run_recipe(recipe, Path("embedded"), tmp_path / "out")
    assert {spec["group"] for spec in build_skeleton(open_checkpoint(tmp_path / "out")).packed.values()} == stored
    assert report.stages[0].label == label
    assert [row.label for row in report.evaluation[0].rows if row.who == "compressed"] == [label]
    told = ["groups of 7 do not divide 128 and 256 inputs: groups of 4 are stored"] if group == 7 else []
    assert list(plan.notes) == told and [line for line in report.warnings if "groups of" in line] == told


def test_a_label_says_the_groups_of_factors(tmp_path: Path) -> None:
    stages = [{"decompose": {"method": "svd", "keep_params": 0.6}}, {"quantize": {"method": "rtn", "group": 20}}]
    recipe = tiny_models.recipe_for(None, *stages)
    report = tiny_models.run_recipe(recipe, Path("embedded"), tmp_path / "out")
    manifest = open_checkpoint(tmp_path / "out").config["quantization_config"]["modules"]
    stored = {spec[side]["group"] for spec in manifest.values() for side in ("left", "right")}
    assert report.stages[1].label == f"rtn 4-bit g{'/'.join(map(str, sorted(stored)))}"
