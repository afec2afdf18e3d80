"""Linearized into layers that stock transformers has: trained, chosen, written, reloaded without us, resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed, dying
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from compressor.engine import distill as distilling
from compressor.engine.native_students import NativeStudents
from compressor.engine.students import Example, relative_error
from compressor.engine.transfer import Lesson, transfer_block
from compressor.errors import UserError
from compressor.hf.linearized import attention_of
from compressor.hf.native import native_block, native_config, native_outer
from compressor.methods.linearize_native import GdnSettings, Mamba2Settings
from compressor.run import linear_report, rounds
from compressor.run.keep import score_layers
from compressor.run.linear_plan import linear_advice
from compressor.run.proof import ProofSizes, prove
from compressor.run.proof_exact import agreement
from compressor.run.stream import foresee

LAYERS = 3
TOKENS = tiny_models.LENGTH * 8  # of a step of 8 windows
FAMILIES = {"mamba2": "qwen2", "gdn": "qwen3"}
MIXERS = {"mamba2": ".mamba.", "gdn": ".linear_attn."}
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.load(f"{folder}/../ids.pt")
    torch.save(model.eval()(input_ids=ids, use_cache=False).logits.detach(), f"{folder}/../logits.pt")
    model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=1)
assert not any(name.startswith("compressor.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wanted = {"num_hidden_layers": LAYERS, "scale": 0.3, "intermediate_size": 64}
    return {
        method: tiny_models.save(tiny_models.random_model(family, **wanted), folder / family)
        for method, family in FAMILIES.items()
    }


def recipe(calibration: Path, method: str, stage: dict[str, Any] | None = None, **content: Any) -> Any:
    plain = {"method": method, "tokens": 12 * TOKENS, "keep_attention": 1}
    return tiny_models.recipe_for(calibration, {"linearize": {**plain, **(stage or {})}}, **content)


@pytest.fixture(scope="module")
def finished(
    sources: dict[str, Path], calibration: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    out = {}
    few = ProofSizes(contexts=(32, 64), distances=(2,), steps=8, decode_steps=3, sample_tokens=8)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(linear_report, "prove", partial(prove, sizes=few))
    for method, source in sources.items():
        # one fresh process more is started below, for both
        evaluation = {"texts": [str(heldout)], "windows": 4}
        judged = recipe(calibration, method, evaluation=evaluation, verify=method == "mamba2")
        output = tmp_path_factory.mktemp(method) / "out"
        before = tiny_models.digest(source)
        out[method] = (output, tiny_models.run_recipe(judged, source, output))
        assert tiny_models.digest(source) == before
    monkeypatch.undo()
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", FAMILIES)
def test_the_report_says_what_was_done(finished: Any, method: str) -> None:
    output, report = finished[method]
    found = report.linearization
    assert not found.own_code and found.method == method and len(found.kept) == 1
    assert sorted([*found.kept, *found.linearized]) == list(range(LAYERS))
    scores = {row.layer: row.score for row in found.selection.scores}
    assert min(scores, key=scores.__getitem__) == found.kept[0]
    assert all(layer.after < layer.before < 1 and layer.memory_after is None for layer in found.transfer)
    assert found.distillation.tokens == 6 * TOKENS
    kl = [point.kl for point in found.distillation.curve]
    assert sum(kl[3:]) < sum(kl[:3])
    dense, compressed = report.evaluation[0].rows
    assert compressed.kl is not None and 0 < compressed.kl < 1
    assert compressed.perplexity != dense.perplexity
    linears = sum(row.bytes for row in report.size.ledger if row.group == "kept linears")
    assert report.size.bits_per_weight_linears == 8 * linears / report.model.linear_parameters > 32
    assert report.size.bits_per_weight_model == 8 * report.size.weights_bytes / report.model.parameters > 32
    architecture = json.loads((output / "config.json").read_text())["architectures"][0]
    assert f"every runtime that loads `{architecture}`" in (output / "README.md").read_text()


def test_the_report_says_what_was_proved(finished: Any) -> None:
    _, report = finished["mamba2"]
    proof = report.linearization.proof
    assert len(proof.agreement) == 4 and all(row.passed for row in proof.agreement)
    assert {row.who for row in proof.positions.rows} == {"teacher", "student"}  # no part to be switched off
    assert proof.decode.state_bytes > 0
    assert report.verification.passed and report.verification.route == "stock transformers"


def test_every_way_to_compute_agrees(finished: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished["gdn"][0], dtype=torch.float32).eval()
    rows = agreement(model, tiny_models.random_ids(2, 60), steps=8)
    assert len(rows) == 4 and all(row.passed for row in rows)


def test_stock_transformers_loads_it_without_us_and_computes_what_the_engine_does(finished: Any) -> None:
    folders = [output for output, _ in finished.values()]
    ids = tiny_models.random_ids(3, 40)
    for folder in folders:
        assert not [*folder.glob("*.py")] and "auto_map" not in (folder / "config.json").read_text()
        torch.save(ids, folder.parent / "ids.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=folders[0])
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        stock, streamed = torch.load(folder.parent / "logits.pt"), tiny_models.streamed_logits(folder, ids)
        assert float((stock - streamed).abs().max()) < 1e-4 * float(stock.abs().max())


@pytest.mark.parametrize("method", FAMILIES)
def test_the_plan_foresees_the_bytes(sources: Any, finished: Any, calibration: Path, method: str) -> None:
    plan = foresee(recipe(calibration, method), str(sources[method]))[1]
    assert plan.container == "plain" and not plan.violations
    assert plan.output_bytes == pytest.approx((finished[method][0] / "model.safetensors").stat().st_size, rel=0.01)


@pytest.mark.parametrize("method", FAMILIES)
def test_it_is_quantized_like_any_other(finished: Any, calibration: Path, tmp_path: Path, method: str) -> None:
    rounded = tiny_models.recipe_for(None, {"quantize": {"method": "rtn", "group": 16}})
    report = tiny_models.run_recipe(rounded, finished[method][0], tmp_path / "out")
    assert any(MIXERS[method] in layer.name and layer.method != "kept" for layer in report.layers)
    ids = tiny_models.random_ids(2, 40)
    stock = tiny_models.stock_logits(tmp_path / "out", ids)
    assert float((stock - tiny_models.streamed_logits(tmp_path / "out", ids)).abs().max()) < 1e-3 * float(stock.max())
    assert float((stock - tiny_models.stock_logits(finished[method][0], ids)).abs().max()) > 1e-3


@pytest.mark.parametrize(("method", "train"), [("mamba2", "full"), ("gdn", "lora")])
def test_killed_in_both_stages_it_ends_with_the_same_bytes(
    sources: Any, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, train: str
) -> None:
    wanted = recipe(calibration, method, {"select": "error", "train": train, "full_rate": 1e-3})
    whole = tiny_models.run_recipe(wanted, sources[method], tmp_path / "whole")
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    transfer, step, calls = rounds.transfer_block, distilling._step, {"transfer": 0, "step": 0}

    monkeypatch.setattr(rounds, "transfer_block", dying(calls, "transfer", transfer, 2))
    monkeypatch.setattr(distilling, "_step", dying(calls, "step", step, 4))
    for _ in range(2):
        with pytest.raises(Killed):
            tiny_models.run_recipe(wanted, sources[method], tmp_path / "out")
    again = tiny_models.run_recipe(wanted, sources[method], tmp_path / "out")
    assert calls == {"transfer": LAYERS + 1, "step": 6 + 1}  # nothing finished was done twice
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again.linearization == whole.linearization


@pytest.mark.parametrize("method", FAMILIES)
def test_training_end_to_end_changes_what_it_should(
    sources: Any, calibration: Path, tmp_path: Path, method: str
) -> None:
    made = {}
    for train in ("none", "lora", "full"):
        stage = {"train": train, "tokens": (6 if train == "none" else 12) * TOKENS, "keep_layers": [1]}
        tiny_models.run_recipe(recipe(calibration, method, stage), sources[method], tmp_path / train)
        made[train] = load_file(tmp_path / train / "model.safetensors")
    assert len({tuple(sorted(tensors)) for tensors in made.values()}) == 1
    same = {
        train: {name for name, value in made[train].items() if torch.equal(value, made["none"][name])}
        for train in ("lora", "full")
    }
    projections = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    new = {name for name in made["none"] if MIXERS[method] in name}
    assert len(new) > 10 and same["lora"] == made["none"].keys() - new - projections
    assert not same["full"]
    if method == "mamba2":  # a bias there would reach padded positions: it stays what it was, in every stage
        inner = len(made["full"]["model.layers.0.mamba.norm.weight"])
        for tensors in made.values():
            bias = tensors["model.layers.0.mamba.in_proj.bias"]
            assert not bias[inner : 4 * inner].any() and bool((bias[4 * inner :] != 0).any())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(sources: Any, calibration: Path, tmp_path: Path) -> None:
    stage = {"train": "full", "full_rate": 1e-3, "keep_layers": [1], "tokens": 8 * TOKENS}
    tiny_models.run_recipe(recipe(calibration, "mamba2", stage), sources["mamba2"], tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "compressor.cli.app", "linearize", str(sources["mamba2"]), "-o", str(tmp_path / "two"),
               "--method", "mamba2", "--tokens", str(8 * TOKENS), "--train", "full", "--full-rate", "1e-3",
               "--keep-layers", "1", "--calibration", str(calibration), "--nsamples", "16",
               "--seqlen", str(tiny_models.LENGTH), "--eval", "none", "--no-verify", "-q"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = tiny_models.random_ids(2, 40)
    one, two = (tiny_models.stock_logits(tmp_path / name, ids) for name in ("one", "two"))
    before = tiny_models.stock_logits(sources["mamba2"], ids)
    assert 0 < float((one - two).abs().max()) < 1e-3 * float((one - before).abs().max())


@pytest.mark.parametrize("method", FAMILIES)
def test_decays_are_trained_at_a_rate_of_their_own(sources: Any, method: str) -> None:
    runner = tiny_models.open_runner(sources[method])
    stream = runner.start(tiny_models.random_ids(16))
    block = runner.load_block(0)
    before = {name: p.clone() for name, p in block.named_parameters()}
    students = NativeStudents(runner.skeleton.checkpoint.config, method)
    fresh = {name: p.detach() for name, p in students.new(students.make(attention_of(block)[1], 0)).items()}
    got = transfer_block(runner, 0, stream, students, Lesson(TOKENS, 8, 1e-2, 1e-4, 0.5, 0))
    # one step: Adam moves every number by its rate, clipped or not
    for name in ("A_log", "dt_bias"):
        assert float((got.tensors[name] - fresh[name]).abs().max()) == pytest.approx(1e-4, rel=0.05), name
    assert float((got.tensors["norm.weight"] - 1).abs().max()) == pytest.approx(1e-2, rel=0.05)
    assert all(torch.equal(before[name], p) for name, p in block.named_parameters())


def test_training_that_does_harm_is_forgotten(sources: Any) -> None:
    runner = tiny_models.open_runner(sources["mamba2"])
    stream = runner.start(tiny_models.random_ids(16))
    runner.load_block(0)
    students = NativeStudents(runner.skeleton.checkpoint.config, "mamba2")
    wild = transfer_block(runner, 0, stream, students, Lesson(20 * TOKENS, 8, 0.9, 1e-3, 0.0, 0))
    assert wild.after == wild.before < max(error for _, error in wild.curve)
    none = transfer_block(runner, 0, stream, students, Lesson(2 * TOKENS, 8, 1e-9, 1e-9, 0.0, 0))
    assert all(torch.allclose(value, none.tensors[name], atol=1e-6) for name, value in wild.tensors.items())


def test_an_example_is_judged_by_the_stock_layers_answer(sources: Any) -> None:
    runner = tiny_models.open_runner(sources["mamba2"])
    attention = attention_of(runner.load_block(0))[1]
    students = NativeStudents(runner.skeleton.checkpoint.config, "mamba2")
    student: Any = students.make(attention, 0).requires_grad_(False)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    answer = student.layer(hidden).detach()
    call = {"attention_mask": None, "position_embeddings": None}
    assert float(relative_error(student, Example((hidden,), call, answer)).detach()) == 0
    assert float(relative_error(student, Example((), {"hidden_states": hidden, **call}, answer / 2))) == pytest.approx(
        1
    )


@torch.no_grad()
@pytest.mark.parametrize("method", FAMILIES)
def test_scores_are_those_of_written_models(sources: Any, tmp_path: Path, method: str) -> None:
    """Of each layer, against a folder in which that layer alone is converted."""
    ids = tiny_models.random_ids(5, 30)
    runner = tiny_models.open_runner(sources[method])
    skeleton = runner.skeleton
    students, made = NativeStudents(skeleton.checkpoint.config, method), {}

    def student(block: int) -> Any:
        made[block] = students.make(attention_of(skeleton.blocks[block])[1], block)
        return made[block]

    found = score_layers(runner, ids, student, add=False)
    wanted = tiny_models.stock_logits(sources[method], ids).log_softmax(-1)
    tensors = {name: skeleton.read(name) for name in skeleton.origins}
    for layer in range(LAYERS):
        written = native_outer(
            method,
            {name: tensors[name] for name in skeleton.outer_tensors()},
            tied=skeleton.config.tie_word_embeddings,
        )
        for block in range(LAYERS):
            prefix = f"model.layers.{block}."
            own = {name.removeprefix(prefix): tensors[name] for name in skeleton.block_tensors(block)}
            state = students.new(made[block]) if block == layer else None
            written |= {prefix + name: value for name, value in native_block(method, own, state).items()}
        folder = tmp_path / str(layer)
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in written.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(native_config(skeleton.checkpoint.config, method, [layer])))
        given = tiny_models.stock_logits(folder, ids).log_softmax(-1)
        assert found[layer] == pytest.approx(float((wanted.exp() * (wanted - given)).sum(-1).mean()), rel=1e-3)


def refused(source: Path, calibration: Path, method: str, **stage: Any) -> str:
    plan = foresee(recipe(calibration, method, stage), str(source))[1]
    with pytest.raises(UserError) as caught:
        plan.refuse()
    return str(caught.value)


def test_what_cannot_be_is_refused_before_it_is_loaded(sources: Any, calibration: Path, tmp_path: Path) -> None:
    for method, source in sources.items():
        assert "--keep-attention 1" in refused(source, calibration, method, keep_attention=0)
        assert "none of the 3 layers" in refused(source, calibration, method, keep_attention=3)
    assert "not qwen3; gdn does" in refused(sources["gdn"], calibration, "mamba2")
    assert "not qwen2; mamba2 does" in refused(sources["mamba2"], calibration, "gdn")
    windowed = tiny_models.save(tiny_models.random_model("mistral"), tmp_path / "mistral")
    assert "sliding window of 8" in refused(windowed, calibration, "mamba2")
    model = tiny_models.random_model("qwen3")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_norm.weight.fill_(0.011)
    tiny = tiny_models.save(model.to(torch.bfloat16), tmp_path / "tiny")
    message = refused(tiny, calibration, "gdn")
    assert "layers.0.self_attn.k_norm.weight loses" in message and "fp32" in message


def test_rates_go_by_the_width_and_there_is_no_window() -> None:
    assert [Mamba2Settings().transfer_rate(hidden) for hidden in (64, 256, 257)] == [1e-2, 1e-2, 3e-3]
    assert GdnSettings(rate=0.5).transfer_rate(4096) == 0.5
    for more in ({"memory_alone": 0.5}, {"window": 64}, {"sinks": 4}):
        with pytest.raises(ValidationError):
            GdnSettings(**more)


def test_the_plan_of_another_method_says_that_this_is_possible(sources: Any, calibration: Path, tmp_path: Path) -> None:
    def advice(source: Path, method: str) -> list[str]:
        plan = foresee(recipe(calibration, method), str(source))[1]
        return linear_advice(plan.recipe.stages, plan.skeleton)

    assert "--method mamba2" in advice(sources["mamba2"], "windowed")[0]
    assert "--method gdn" in advice(sources["gdn"], "windowed")[0]
    assert not advice(sources["gdn"], "gdn")
    assert not advice(tiny_models.save(tiny_models.random_model("phi3"), tmp_path / "phi3"), "windowed")
