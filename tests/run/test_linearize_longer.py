"""The third stage of linearization on longer windows, and predictions of the dense model that are learned from disk."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed
from torch import Tensor

from compressor.engine import distill as distilling
from compressor.engine import teacher_logits
from compressor.engine.output import check_working, working_folder
from compressor.engine.teacher_logits import StoredTeacher, TopLogits, index_dtype, largest, store_logits, stored_bytes
from compressor.errors import UserError
from compressor.methods.linearize_base import BUDGETS
from compressor.methods.linearize_settings import LINEARIZE_METHODS
from compressor.report.html import render_html
from compressor.run import distillation
from compressor.run.linear_plan import training_bytes
from compressor.run.longer import Longer, foresee_longer, longer_violations
from compressor.run.recipe import make_recipe
from compressor.run.stream import foresee

LAYERS = 3
LONG = 2 * tiny_models.LENGTH
TOKENS = tiny_models.LENGTH * 8  # of a step of 8 windows, or of 4 long ones
BOTH = {"long_tokens": 3 * TOKENS, "long_seqlen": LONG}
STORED = {"store_logits": True, "top_k": 20}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.random_model("qwen2", num_hidden_layers=LAYERS, scale=0.3)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "qwen2")


def recipe(calibration: Path, stage: dict[str, Any], **content: Any) -> Any:
    plain = {"method": "windowed", "window": 6, "sinks": 2, "tokens": 8 * TOKENS, "keep_layers": [1]}
    return tiny_models.recipe_for(calibration, {"linearize": {**plain, **stage}}, **content)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def logits(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def dying(plain: Any, fatal: int, calls: list[int]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == fatal:
            raise Killed
        return plain(*args, **kwargs)

    return call


@pytest.mark.parametrize(("top_k", "vocabulary"), [(3, 9), (64, 300), (9, 9), (500, 9)])
def test_the_loss_of_stored_predictions_is_that_of_live_ones(top_k: int, vocabulary: int) -> None:
    wanted, given = logits(4, 7, vocabulary, seed=0), logits(4, 7, vocabulary, seed=1)
    found = largest(wanted, top_k)
    live = float(distilling.soft_loss(wanted, given, top_k))
    assert float(distilling.soft_loss(found, given, top_k)) == pytest.approx(live, rel=1e-6)
    rounded = TopLogits(found.logs.half().float(), found.chosen)
    assert float(distilling.soft_loss(rounded, given, top_k)) == pytest.approx(live, rel=1e-3)
    coarse = TopLogits(found.logs.bfloat16().float(), found.chosen)
    errors = [abs(float(distilling.soft_loss(x, given, top_k)) - live) for x in (rounded, coarse)]
    assert errors[0] < errors[1]


def test_certain_and_impossible_predictions_leave_the_loss_finite() -> None:
    wanted = torch.full((2, 12), -math.inf)
    wanted[0, 3], wanted[1, :2] = 0.0, torch.tensor([30.0, 0.0])
    found = largest(wanted, 4)
    stored = TopLogits(found.logs.clamp_min(torch.finfo(torch.float16).min).half().float(), found.chosen)
    given = logits(2, 12, seed=2)
    log_q = given.log_softmax(-1)
    certain = -float(log_q[0, 3] + log_q[1, 0])
    assert float(distilling.soft_loss(stored, given, 4)) == pytest.approx(certain, rel=1e-4)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(256, torch.uint8), (65536, torch.uint16), (65537, torch.int32)])
def test_the_smallest_integers_hold_the_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    assert index_dtype(vocabulary) == dtype
    last = torch.tensor([vocabulary - 1])
    assert torch.equal(last.to(dtype).long(), last)
    assert stored_bytes(10, 4, vocabulary) == 10 * 4 * (2 + dtype.itemsize)


def test_predictions_on_disk_are_those_of_the_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.engine.teacher_logits.LOGITS_AT_ONCE", 7 * tiny_models.VOCABULARY)
    runner, ids = tiny_models.open_runner(source), tiny_models.random_ids(5)
    stream = runner.start(ids)
    runner.run(stream)
    told: list[int] = []
    size = store_logits(tmp_path / "logits.safetensors", runner, stream, 20, told.append)
    assert told == [tiny_models.LENGTH] * 5
    assert stored_bytes(ids.numel(), 20, tiny_models.VOCABULARY) < size < 1.2 * stored_bytes(ids.numel(), 20, 288)
    found = StoredTeacher(tmp_path / "logits.safetensors", torch.device("cpu"))([3, 0, 3], ids[[3, 0, 3]])
    wanted = tiny_models.stock_logits(source, ids[[3, 0, 3]])
    expected = wanted.log_softmax(-1).topk(20, -1)
    torch.testing.assert_close(found.logs, expected.values, rtol=6e-4, atol=1e-4)
    torch.testing.assert_close(wanted.log_softmax(-1).gather(-1, found.chosen), expected.values, rtol=0, atol=1e-5)
    given = logits(*wanted.shape, seed=3)
    live = float(distilling.soft_loss(wanted, given, 20))
    assert float(distilling.soft_loss(found, given, 20)) == pytest.approx(live, rel=5e-4)


def test_a_run_from_disk_does_what_a_run_beside_the_model_does(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both train all weights at large rates, so that what is learned is far more than what is rounded."""
    trained = {"train": "full", "full_rate": 1e-3, **BOTH, "top_k": 20, "long_rate": 1.0}
    beside = tiny_models.run_recipe(recipe(calibration, trained), source, tmp_path / "live")
    stored = tiny_models.run_recipe(recipe(calibration, {**trained, **STORED}), source, tmp_path / "disk")
    ids = tiny_models.random_ids(2, 40)
    before, live, disk = (
        tiny_models.stock_logits(folder, ids) for folder in (source, tmp_path / "live", tmp_path / "disk")
    )
    assert float((live - disk).abs().max()) < 5e-3 * float((live - before).abs().max())
    for one, other in zip(
        beside.linearization.distillation.curve, stored.linearization.distillation.curve, strict=True
    ):
        assert other.kl == pytest.approx(one.kl, rel=5e-3)
        assert other.ce == pytest.approx(one.ce, rel=5e-3)
    told = stored.linearization.distillation
    assert "20 largest" in told.teacher and "disk" in told.teacher
    windows = 16 * tiny_models.LENGTH + told.longer.windows * LONG
    assert stored_bytes(windows, 20, tiny_models.VOCABULARY) < told.stored_bytes
    assert beside.linearization.distillation.stored_bytes is None
    assert "predictions of the teacher for each token, on disk" in render_html(stored)


def test_from_disk_the_model_is_not_held_beside_the_student(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's weights are those that were read, so that there is one copy; and nobody asks the dense model."""
    monkeypatch.setattr(distillation, "asking", None)
    read: list[Any] = []
    load, step = distillation.load_dense, distilling._step

    def loading(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        read.extend(p.data_ptr() for p in model.parameters())
        return model

    def stepping(leg: Any, model: Any, *rest: Any) -> Any:
        own = {name: p.data_ptr() for name, p in model.named_parameters() if ".lin_" not in name}
        assert set(own.values()) == set(read)
        return step(leg, model, *rest)

    monkeypatch.setattr(distillation, "load_dense", loading)
    monkeypatch.setattr(distilling, "_step", stepping)
    wanted = recipe(calibration, {"train": "full", **STORED})
    tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert read
    plan = foresee(wanted, str(source))[1]
    beside = foresee(recipe(calibration, {"train": "full"}), str(source))[1]
    whole = 4 * plan.skeleton.parameters()
    assert (
        training_bytes(beside.recipe.stages, beside.skeleton) - training_bytes(plan.recipe.stages, plan.skeleton)
        == whole
    )


def test_layers_of_stock_transformers_learn_from_disk_without_the_model(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.random_model("qwen3", num_hidden_layers=LAYERS, scale=0.3, intermediate_size=64)
    source = tiny_models.save(model, tmp_path / "qwen3")
    monkeypatch.setattr(distillation, "load_dense", None)
    stage = {"method": "gdn", "tokens": 4 * TOKENS, "keep_layers": [1], **STORED, **BOTH}
    report = tiny_models.run_recipe(tiny_models.recipe_for(calibration, {"linearize": stage}), source, tmp_path / "out")
    assert [point.stage for point in report.linearization.distillation.curve] == [2, 2, 3, 3, 3]


def test_killed_anywhere_it_ends_with_the_same_bytes(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(calibration, {**STORED, **BOTH})
    whole = tiny_models.run_recipe(wanted, source, tmp_path / "whole")
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    stored: list[int] = []
    steps: list[int] = []
    monkeypatch.setattr(teacher_logits, "_part", dying(teacher_logits._part, 20, stored))
    monkeypatch.setattr(distilling, "_step", dying(distilling._step, 6, steps))
    work = working_folder(tmp_path / "out")
    with pytest.raises(Killed):
        tiny_models.run_recipe(wanted, source, tmp_path / "out")
    # killed among the long windows: the short ones are whole, of the long ones there is only what nobody takes for it
    names = {file.name for file in work.glob("logits*")}
    assert names == {"logits.safetensors", "logits-long.safetensors.tmp"}
    check_working(work)
    with pytest.raises(Killed):
        tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert len(stored) == 20 + 8  # the short ones were not computed again
    check_working(work)
    again = tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert len(stored) == 20 + 8
    assert len(steps) == 4 + 3 + 1  # nothing finished was done twice
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again.linearization == whole.linearization
    assert not work.exists()


def test_longer_windows_come_last_with_steps_of_as_many_tokens(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    rates: list[float] = []
    step, optimize = distilling._step, torch.optim.AdamW.step

    def watching(leg: Any, model: Any, windows: Any, *rest: Any) -> Any:
        seen.append((len(windows), leg.ids.shape[1]))
        return step(leg, model, windows, *rest)

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if seen:
            rates.append(max(group["lr"] / group["peak"] for group in self.param_groups))
        return optimize(self, *args, **kwargs)

    monkeypatch.setattr(distilling, "_step", watching)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    report = tiny_models.run_recipe(recipe(calibration, BOTH), source, tmp_path / "out")
    assert seen == [(8, tiny_models.LENGTH)] * 4 + [(4, LONG)] * 3
    assert max(rates[:4]) == pytest.approx(1.0)
    assert max(rates[4:]) == pytest.approx(0.1)
    told = report.linearization.distillation
    assert told.longer.tokens == 3 * TOKENS and told.longer.seqlen == LONG
    assert (told.longer.windows, told.longer.batch) == (8, 4)
    assert told.tokens == 7 * TOKENS
    assert [(point.tokens // TOKENS, point.stage) for point in told.curve] == [
        (1, 2), (2, 2), (3, 2), (4, 2), (5, 3), (6, 3), (7, 3)
    ]  # fmt: skip
    page = render_html(report)
    assert f"the last {3 * TOKENS:,} of them in windows of {LONG}" in page
    assert "KL, longer windows" in page


def test_without_a_third_stage_nothing_changes(source: Path, calibration: Path, tmp_path: Path) -> None:
    short = tiny_models.run_recipe(recipe(calibration, {}), source, tmp_path / "short")
    told = short.linearization.distillation
    assert told.longer is None and {point.stage for point in told.curve} == {2}
    tiny_models.run_recipe(recipe(calibration, {"long_tokens": 0}), source, tmp_path / "none")
    assert weights(tmp_path / "short") == weights(tmp_path / "none")


def test_budgets() -> None:
    settings = LINEARIZE_METHODS["windowed"]
    assert [settings(budget=name).longer for name in BUDGETS] == [0, 0, 0, 1_000_000_000]
    assert settings(budget="large", tokens=100).longer == 0
    assert settings(budget="large", train="none").longer == 0
    assert settings(budget="large", long_tokens=5).longer == 5
    large = settings(budget="large")
    assert foresee_longer(large, 2048, 128, 131072) == Longer(1_000_000_000, 16384, 16, 1)
    assert foresee_longer(large, 2048, 128, 8192) == Longer(1_000_000_000, 8192, 32, 2)
    assert foresee_longer(large, 2048, 128, 2048) is None  # no room, and nobody asked


def refused(source: Path, calibration: Path, **stage: Any) -> str:
    plan = foresee(recipe(calibration, stage), str(source))[1]
    with pytest.raises(UserError) as caught:
        plan.refuse()
    return str(caught.value)


def test_what_cannot_be_is_refused_before_anything_is_loaded(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--top-k" in refused(source, calibration, store_logits=True)
    assert "--train none" in refused(source, calibration, **STORED, train="none")
    assert "--train none" in refused(source, calibration, **BOTH, train="none")
    assert "context of qwen2, 64; --long-seqlen 64" in refused(source, calibration, long_tokens=1, long_seqlen=65)
    assert "no longer than those before it (24); --long-seqlen 64" in refused(
        source, calibration, long_tokens=1, long_seqlen=24
    )
    assert "--long-tokens N" in refused(source, calibration, long_seqlen=48)
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = LINEARIZE_METHODS["windowed"](**BOTH)
    found = longer_violations(settings, foresee_longer(settings, 24, 16, 64), 24, 64, "m")
    assert len(found) == 1 and "4 windows of 48 tokens cannot be shared by 3 processes" in found[0]
    monkeypatch.delenv("WORLD_SIZE")
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "the old river goes"}\n' * 200)
    content = {"sources": [f"{few}:sampling=random-crop"], "nsamples": 4, "seqlen": 3}
    wanted = make_recipe({**recipe(few, {"window": 2, **BOTH}).resolved(), "calibration": content})
    with pytest.raises(UserError, match=r"third stage, windows of 48 tokens: .*few.*have 48 tokens.*--long-seqlen"):
        tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert not working_folder(tmp_path / "out").exists()


def test_texts_shorter_than_the_long_windows_are_told(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text("".join(f'{{"text": "{tiny_models.text(seed, 4)}"}}\n' for seed in range(200)))
    report = tiny_models.run_recipe(recipe(file, BOTH), source, tmp_path / "out")
    assert any("hold several" in warning and "random-crop" in warning for warning in report.warnings)


def test_the_plan_counts_what_will_be_stored(source: Path, calibration: Path) -> None:
    with_longer, without = (foresee(recipe(calibration, stage), str(source))[1] for stage in ({**STORED, **BOTH}, {}))
    assert without.logits_bytes == 0
    assert with_longer.logits_bytes == stored_bytes(2 * 16 * tiny_models.LENGTH, 20, tiny_models.VOCABULARY)
    assert with_longer.disk_bytes - without.disk_bytes == with_longer.logits_bytes


@pytest.mark.slow
def test_two_processes_read_the_same_predictions(source: Path, calibration: Path, tmp_path: Path) -> None:
    stage = {"train": "full", "full_rate": 1e-3, **STORED, **BOTH}
    tiny_models.run_recipe(recipe(calibration, stage), source, tmp_path / "one")
    flags = ["--window", "6", "--sinks", "2", "--tokens", str(8 * TOKENS), "--train", "full", "--full-rate", "1e-3",
             "--keep-layers", "1", "--store-logits", "--top-k", "20", "--long-tokens", str(3 * TOKENS),
             "--long-seqlen", str(LONG)]  # fmt: skip
    text = ["--calibration", str(calibration), "--nsamples", "16", "--seqlen", str(tiny_models.LENGTH)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "compressor.cli.app", "linearize", str(source), "-o", str(tmp_path / "two"),
               *flags, *text, "--eval", "none", "--no-verify", "-q"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tiny_models.stock_logits(tmp_path / name, tiny_models.random_ids(2, 40)) for name in ("one", "two"))
    before = tiny_models.stock_logits(source, tiny_models.random_ids(2, 40))
    assert float((one - two).abs().max()) < 1e-3 * float((one - before).abs().max())
