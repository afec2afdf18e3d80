"""Learning all codes of a model together, against training the whole model at once; and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from compressor.engine import distill_codes as distilling
from compressor.engine.distill_codes import Distilled, distill
from compressor.engine.skeleton import Linear
from compressor.engine.tune import Learner
from compressor.methods import pb_llm
from compressor.methods.learned import SignLearner
from compressor.methods.quantize_settings import PbLlmSettings

WINDOWS, BATCH, STEPS, RATE = 18, 2, 7, 0.05


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.random_model(request.param), tmp_path_factory.mktemp("models") / request.param)


def learners_of(runner: Any) -> dict[str, tuple[Linear, Learner]]:
    found: dict[str, tuple[Linear, Learner]] = {}
    for linear in runner.skeleton.linears:
        weight = runner.skeleton.read(f"{linear.name}.weight").float()
        weight = weight.T.contiguous() if linear.transposed else weight
        code = pb_llm.solve(weight, None, PbLlmSettings(group=16)).code
        found[linear.name] = linear, SignLearner(code, weight)
    return found


def learned(folder: Path, scratch: Path) -> tuple[Distilled, dict[str, tuple[Linear, Learner]]]:
    runner, ids = tiny_models.open_runner(folder), tiny_models.random_ids(WINDOWS)
    dense = runner.start(ids)
    runner.run(dense)
    stream = runner.start(ids)
    stream.batch = BATCH
    stream.calls = [runner.start(ids[i : i + BATCH]).calls[0] for i in range(0, WINDOWS, BATCH)]
    learners, before = learners_of(runner), stream.states.clone()
    told = distill(
        runner,
        stream,
        lambda windows: runner.head(ids[windows], dense.states[windows]),
        learners,
        steps=STEPS,
        rate=RATE,
        folder=scratch,
    )
    assert torch.equal(stream.states, before)
    return told, learners


def at_once(folder: Path) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """The same, plainly: the whole model in memory. Losses held out, parameters at the start and at the end."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, learners = tiny_models.random_ids(WINDOWS), learners_of(tiny_models.open_runner(folder))
    pairs = [pair for _, one in learners.values() for pair in one.parameters()]
    start = [tensor.clone() for tensor, _ in pairs]
    optimizer = torch.optim.Adam(
        [{"params": [tensor.requires_grad_(True)], "lr": RATE * pace} for tensor, pace in pairs], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    batches = list(ids.split(BATCH))
    held = batches.pop(7)

    def divergence(batch: Tensor) -> Tensor:
        own = {}
        for name, (linear, one) in learners.items():
            own[f"{name}.weight"] = one.weight().T if linear.transposed else one.weight()
        wanted = model(input_ids=batch).logits.detach().softmax(-1)
        found = functional_call(model, own, kwargs={"input_ids": batch}).logits.log_softmax(-1)
        return (wanted * (wanted.log() - found)).sum(-1).mean()

    losses = [float(divergence(held).detach())]
    for step in range(STEPS):
        optimizer.zero_grad()
        divergence(batches[step % len(batches)]).backward()
        optimizer.step()
        schedule.step()
        losses.append(float(divergence(held).detach()))
    return losses, start, [tensor.detach() for tensor, _ in pairs]


def test_it_is_training_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    told, learners = learned(folder, tmp_path)
    losses, start, end = at_once(folder)
    assert [step for step, _ in told.curve] == list(range(STEPS + 1))
    assert [loss for _, loss in told.curve] == pytest.approx(losses, rel=2e-3)
    assert told.before > 1.05 * told.after > 0
    assert told.step == min(range(STEPS + 1), key=[loss for _, loss in told.curve].__getitem__)
    if told.step == STEPS:
        found = [tensor for _, one in learners.values() for tensor, _ in one.parameters()]
        moved = torch.cat([(a - b).flatten() for a, b in zip(end, start, strict=True)])
        apart = torch.cat([(a - b).flatten() for a, b in zip(end, found, strict=True)])
        assert float(apart.norm()) < 0.02 * float(moved.norm())


@pytest.mark.parametrize("fatal", [1, 4, STEPS])
def test_killed_in_a_step_it_goes_on_to_the_same_bits(
    fatal: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two judgements as well: the state is put down after every step here."""
    monkeypatch.setattr(distilling, "SAVED_EVERY", -1.0)
    monkeypatch.setattr(distilling, "JUDGEMENTS", 2)
    whole, expected = learned(folder, tmp_path)
    codes = {name: one.finish().parts() for name, (_, one) in expected.items()}  # type: ignore[union-attr, call-arg]
    (scratch := tmp_path / "killed").mkdir()
    calls, real = 0, distilling.loss_backward

    def dies(*args: Any, **kwargs: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distilling, "loss_backward", dies)
        with pytest.raises(Killed):
            learned(folder, scratch)
        told, learners = learned(folder, scratch)
    assert calls == STEPS + 1  # no step that was saved was taken again
    assert told == whole
    for name, (_, one) in learners.items():
        for part, tensor in one.finish().parts().items():  # type: ignore[union-attr, call-arg]
            assert torch.equal(tensor, codes[name][part]), (name, part)
