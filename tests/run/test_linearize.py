"""Linearized as the command does it: trained, chosen, written, reloaded, resumed, shared out, compressed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed, dying
from torch import Tensor

from compressor.engine import distill as distilling
from compressor.engine.lora import LoraLinear, add_lora
from compressor.engine.students import OwnStudents
from compressor.engine.transfer import Lesson, transfer_block, with_attention
from compressor.errors import UserError
from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linearized import attention_of
from compressor.mixers.spec import MixerSpec
from compressor.run import rounds
from compressor.run.keep import choose, score_layers
from compressor.run.stream import foresee

LAYERS = 3
TOKENS = tiny_models.LENGTH * 8  # of a step of 8 windows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.random_model("qwen2", num_hidden_layers=LAYERS, scale=0.3)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "qwen2")


def recipe(calibration: Path, stage: dict[str, Any] | None = None, **content: Any) -> Any:
    plain = {"method": "windowed", "window": 6, "sinks": 2, "tokens": 12 * TOKENS, "keep_attention": 1}
    return tiny_models.recipe_for(calibration, {"linearize": {**plain, **(stage or {})}}, **content)


@pytest.fixture(scope="module")
def finished(source: Path, calibration: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("linear") / "out"
    judged = recipe(calibration, evaluation={"texts": [str(heldout)], "windows": 4}, verify=True)
    before = tiny_models.digest(source)
    report = tiny_models.run_recipe(judged, source, output)
    assert tiny_models.digest(source) == before
    return output, report


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_report_says_what_was_done_and_what_was_proved(finished: Any) -> None:
    _, report = finished
    found = report.linearization
    assert len(found.kept) == 1
    assert sorted([*found.kept, *found.linearized]) == list(range(LAYERS))
    scores = {row.layer: row.score for row in found.selection.scores}
    assert min(scores, key=scores.__getitem__) == found.kept[0]
    assert all(layer.after < layer.before for layer in found.transfer)
    assert found.distillation.curve[-1].kl < found.distillation.curve[0].kl
    assert found.distillation.tokens == 6 * TOKENS
    assert found.proof.exactness.passed
    assert all(row.passed for row in found.proof.agreement)
    assert report.verification.passed
    dense, compressed = report.evaluation[0].rows
    assert compressed.kl is not None and compressed.kl < 0.5
    assert compressed.perplexity != dense.perplexity


def test_a_fresh_load_computes_what_the_engine_does(finished: Any) -> None:
    ids = tiny_models.random_ids(3, 40)
    stock, streamed = tiny_models.stock_logits(finished[0], ids), tiny_models.streamed_logits(finished[0], ids)
    assert float((stock - streamed).abs().max()) < 1e-4 * float(stock.abs().max())


@pytest.mark.parametrize(
    "stage",
    [{"prune": {"method": "wanda"}}, {"quantize": {"method": "rtn", "group": 16}}, {"decompose": {"method": "svd"}}],
    ids=lambda stage: next(iter(stage)),
)
def test_it_is_compressed_like_any_other(finished: Any, stage: Any, calibration: Path, tmp_path: Path) -> None:
    report = tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), finished[0], tmp_path / "out")
    assert {layer.method for layer in report.layers} != {"kept"}
    ids = tiny_models.random_ids(2, 40)
    stock, streamed = (
        tiny_models.stock_logits(tmp_path / "out", ids),
        tiny_models.streamed_logits(tmp_path / "out", ids),
    )
    assert float((stock - streamed).abs().max()) < 1e-3 * float(stock.abs().max())
    assert float((stock - tiny_models.stock_logits(finished[0], ids)).abs().max()) > 1e-3


def test_killed_in_both_stages_it_ends_with_the_same_bytes(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(calibration, {"select": "error"})
    whole = tiny_models.run_recipe(wanted, source, tmp_path / "whole")
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    transfer, step, calls = rounds.transfer_block, distilling._step, {"transfer": 0, "step": 0}

    monkeypatch.setattr(rounds, "transfer_block", dying(calls, "transfer", transfer, 2))
    monkeypatch.setattr(distilling, "_step", dying(calls, "step", step, 4))
    for _ in range(2):
        with pytest.raises(Killed):
            tiny_models.run_recipe(wanted, source, tmp_path / "out")
    again = tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert calls == {"transfer": LAYERS + 1, "step": 6 + 1}  # nothing finished was done twice
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again.linearization == whole.linearization
    assert again.resumed is not None and again.resumed.times == 2


@pytest.mark.slow
def test_two_processes_train_what_one_trains(source: Path, calibration: Path, tmp_path: Path) -> None:
    wanted = recipe(calibration, {"train": "full", "full_rate": 1e-3, "keep_layers": [1], "tokens": 8 * TOKENS})
    alone = tiny_models.run_recipe(wanted, source, tmp_path / "one")
    flags = ["--window", "6", "--sinks", "2", "--tokens", str(8 * TOKENS), "--train", "full", "--full-rate", "1e-3"]
    text = ["--calibration", str(calibration), "--nsamples", "16", "--seqlen", str(tiny_models.LENGTH)]
    # with --cpu it would start one process only, unless there is MPI
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--main_process_port", "0", "-m",
               "compressor.cli.app", "linearize", str(source), "-o", str(tmp_path / "two"), *flags,
               "--keep-layers", "1", *text, "--eval", "none", "--no-verify", "-q"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tiny_models.stock_logits(tmp_path / name, tiny_models.random_ids(2, 40)) for name in ("one", "two"))
    before = tiny_models.stock_logits(source, tiny_models.random_ids(2, 40))
    assert float((one - two).abs().max()) < 1e-3 * float((one - before).abs().max())
    assert alone.linearization.distillation.tokens == 4 * TOKENS


def test_every_new_scalar_moves_and_the_block_stays(source: Path) -> None:
    runner = tiny_models.open_runner(source)
    stream = runner.start(tiny_models.random_ids(16))
    block = runner.load_block(0)
    before = {name: p.clone() for name, p in block.named_parameters()}
    spec = MixerSpec("windowed", 6, 2, "shared", 16, "hedgehog", "scalar", per_query=True)
    fresh = dict(LinearAttention(attention_of(block)[1], spec, 0).named_parameters())
    got = transfer_block(runner, 0, stream, OwnStudents(spec), Lesson(50 * TOKENS, 8, 1e-2, 1e-3, 0.3, 0))
    assert got.tensors.keys() == {name for name in fresh if name.startswith("lin_")}
    for name, tensor in got.tensors.items():
        assert bool((tensor != fresh[name]).all()), name
    assert got.after < 0.95 * got.before
    assert all(torch.equal(before[name], p) for name, p in block.named_parameters())


def test_an_attention_with_something_more_is_found_out(source: Path) -> None:
    runner = tiny_models.open_runner(source)
    stream = runner.start(tiny_models.random_ids(16))
    attention: Any = attention_of(runner.load_block(0))[1]
    attention.scaling *= 1.5
    LinearAttention(attention, MixerSpec("w", 6, 0, "window"), 0)  # takes the scale over
    plain = type(attention).forward

    def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return (torch.tanh(out[0]), *out[1:])

    type(attention).forward = capped
    try:
        with pytest.raises(UserError, match=r"block 0 .* has a feature .*--keep-layers 0"):
            students = OwnStudents(MixerSpec("w", 6, 0, "window"))
            transfer_block(runner, 0, stream, students, Lesson(TOKENS, 8, 1e-2, 1e-3, 0.0, 0))
    finally:
        type(attention).forward = plain


@torch.no_grad()
@pytest.mark.parametrize("add", [True, False])
def test_scores_are_those_of_whole_models(source: Path, add: bool) -> None:
    """Against models that are put together and run as a whole, one for each layer."""
    from transformers import AutoModelForCausalLM

    ids = tiny_models.random_ids(5, 30)
    spec = MixerSpec("windowed", 4, 1, "shared", 8, "hedgehog", "fixed", memory_weight=0.5)
    runner = tiny_models.open_runner(source)
    found = score_layers(
        runner, ids, lambda i: LinearAttention(attention_of(runner.skeleton.blocks[i])[1], spec, i), add=add
    )
    model: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    wanted = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    for layer in range(LAYERS):
        linear = [i for i in range(LAYERS) if (i != layer) == add]
        for i in linear:
            block = model.model.layers[i]
            block.dense, block.self_attn = block.self_attn, LinearAttention(block.self_attn, spec, i)
        given = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for i in linear:
            model.model.layers[i].self_attn = model.model.layers[i].dense
        expected = float((wanted.exp() * (wanted - given)).sum(-1).mean())
        assert found[layer] == pytest.approx(expected, rel=1e-3)


def test_choices() -> None:
    scores = [0.3, 0.1, 0.4, 0.2]
    assert choose("kl-add", 2, scores) == [1, 3]
    assert choose("kl-replace", 2, scores) == [0, 2]
    assert choose("error", 1, scores) == [2]
    assert choose("even", 1, [0.0] * 4) == [2]
    assert choose("even", 2, [0.0] * 8) == [2, 6] or choose("even", 2, [0.0] * 8) == [1, 5]
    assert choose("kl-add", 0, scores) == []


def logits(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_the_loss_is_the_divergence_and_the_rest_counts_as_one() -> None:
    wanted, given = logits(4, 9, seed=0), logits(4, 9, seed=1)
    p, q = wanted.softmax(-1), given.softmax(-1)
    whole = float((p * (p / q).log()).sum())
    assert float(distilling.soft_loss(wanted, given, 0)) == pytest.approx(whole, rel=1e-5)
    order = wanted.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p, q = (torch.cat([x[:, :3], x[:, 3:].sum(-1, keepdim=True)], -1) for x in (p, q))
    few = float((p * (p / q).log()).sum())
    assert float(distilling.soft_loss(wanted, given, 3)) == pytest.approx(few, rel=1e-4)
    assert few < whole


def test_updates_begin_as_nothing_and_merge_into_what_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    x = logits(5, 8, seed=2).float()
    before = model(x)
    update = add_lora(model, ["0"], 2, seed=0)["0"]
    assert isinstance(update, LoraLinear)
    assert torch.equal(model(x), before)
    update.lora_b.data.normal_(generator=torch.Generator().manual_seed(3))
    merged = torch.nn.functional.linear(x, update.weight, update.base.bias)
    assert float((model(x) - merged).detach().abs().max()) < 1e-5
    assert float((merged - before).detach().abs().max()) > 0.1


def refused(source: Path, calibration: Path, **stage: Any) -> str:
    plan = foresee(recipe(calibration, stage), str(source))[1]
    with pytest.raises(UserError) as caught:
        plan.refuse()
    return str(caught.value)


def test_what_cannot_be_is_refused_before_it_is_loaded(
    source: Path, finished: Any, calibration: Path, tmp_path: Path
) -> None:
    assert "fit the attention window of 24" in refused(source, calibration, window=24)
    assert "layers 0 to 2" in refused(source, calibration, keep_layers=[3])
    assert "none of the 3 layers" in refused(source, calibration, keep_attention=3)
    assert "linearized already" in refused(finished[0], calibration)
    for family, words in [
        ("gemma2", "attn_logit_softcapping"),
        ("mistral", "sliding_window"),
        ("gpt2", "no attention with q_proj"),
    ]:
        folder = tiny_models.save(tiny_models.random_model(family), tmp_path / family)
        assert words in refused(folder, calibration)
    pruned = tmp_path / "pruned"
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, {"method": "magnitude"}), source, pruned)
    assert "linearize the original model first" in refused(pruned, calibration)
    with pytest.raises(UserError, match="must be the only stage"):
        tiny_models.recipe_for(calibration, {"linearize": {"method": "windowed"}}, {"prune": {"method": "wanda"}})


def test_the_plan_foresees_the_bytes(source: Path, finished: Any, calibration: Path) -> None:
    plan = foresee(recipe(calibration), str(source))[1]
    assert plan.output_bytes == pytest.approx((finished[0] / "model.safetensors").stat().st_size, rel=0.01)


def test_another_attention_for_a_while(source: Path) -> None:
    runner = tiny_models.open_runner(source)
    block = runner.skeleton.blocks[0]
    own = attention_of(block)[1]
    other = LinearAttention(own, MixerSpec("w", 4, 0, "window"), 0)
    with pytest.raises(RuntimeError), with_attention(block, other):
        assert attention_of(block)[1] is other
        raise RuntimeError
    assert attention_of(block)[1] is own


def test_activations_computed_again_give_the_same(source: Path, calibration: Path, tmp_path: Path) -> None:
    stage = {"keep_layers": [0], "train": "full", "full_rate": 1e-3, "tokens": 4 * TOKENS}
    for name, again in (("kept", False), ("again", True)):
        wanted = recipe(calibration, {**stage, "gradient_checkpointing": again})
        report = tiny_models.run_recipe(wanted, source, tmp_path / name)
        assert not any("times over the same" in warning for warning in report.warnings)
    ids = tiny_models.random_ids(2, 40)
    kept, again = (tiny_models.stock_logits(tmp_path / name, ids) for name in ("kept", "again"))
    assert float((kept - again).abs().max()) < 1e-4 * float(kept.abs().max())


def test_the_same_text_again_and_again_is_told(source: Path, calibration: Path, tmp_path: Path) -> None:
    wanted = recipe(calibration, {"train": "none", "tokens": 400 * TOKENS, "batch": 400, "keep_layers": [0, 1]})
    report = tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert any("100 times over the same 384 tokens" in warning for warning in report.warnings)
