"""Codes that can be learned: they start where they were, stay of the same kind, and follow their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.formats import GroupInt, PartialBinary, TritPlanes
from compressor.methods.learned import FlexRoundLearner, SignLearner, TritLearner
from compressor.methods.quantize_settings import PbLlmSettings, RtnSettings, TritPlanesSettings
from compressor.methods.quantizers import quantize

LEARNERS: dict[str, Any] = {
    "integers": FlexRoundLearner,
    "zero points": FlexRoundLearner,
    "trits": TritLearner,
    "signs": SignLearner,
    "columns": SignLearner,
    "signs without means": SignLearner,
}


def weights(seed: int = 0) -> Tensor:
    return torch.randn(12, 40, generator=torch.Generator().manual_seed(seed))


def code_of(kind: str, weight: Tensor) -> Any:
    if kind == "trits":
        return quantize("trit-planes", weight, None, TritPlanesSettings(planes=2, group=16, fit="data-free")).code
    if kind in ("signs", "columns", "signs without means"):
        mask: Any = "column" if kind == "columns" else "unstructured"
        settings = PbLlmSettings(mask=mask, group=16, means=kind != "signs without means")
        return quantize("pb-llm", weight, None, settings).code
    grid = RtnSettings(bits=3, group=10, asymmetric=kind == "zero points")
    return quantize("rtn", weight, None, grid).code


@pytest.mark.parametrize("kind", LEARNERS)
def test_learning_starts_at_the_code_and_can_end_there(kind: str) -> None:
    weight = weights()
    code = code_of(kind, weight)
    learner = LEARNERS[kind](code, weight)
    assert torch.equal(learner.weight(), code.dense())
    assert torch.equal(learner.finish().dense(), code.dense())
    assert learner.finish().spec(torch.float32) == code.spec(torch.float32)


@pytest.mark.parametrize("kind", LEARNERS)
def test_what_is_finished_is_what_was_judged(kind: str) -> None:
    """After any change of the parameters, the stored value is the value that learning computed with."""
    weight = weights(1)
    learner = LEARNERS[kind](code_of(kind, weight), weight)
    generator = torch.Generator().manual_seed(2)
    for tensor, pace in learner.parameters():
        tensor.add_(0.3 * pace * torch.randn(tensor.shape, generator=generator))
    code = learner.finish()
    assert torch.equal(code.dense(), learner.weight())
    parts = code.parts(torch.float32) if isinstance(code, GroupInt) else code.parts()
    assert torch.equal(type(code).read(parts, code.spec(torch.float32)).dense(), code.dense())


@pytest.mark.parametrize("kind", LEARNERS)
def test_gradients_lead_to_a_target(kind: str) -> None:
    weight = weights(3)
    code = code_of(kind, weight)
    learner = LEARNERS[kind](code, weight)
    target = weight * 1.2  # no code of the start is best for it
    if isinstance(code, PartialBinary):  # nor can salient weights move
        flipped = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.3
        target = replace(code, signs=code.signs ^ flipped).dense()
    pairs = learner.parameters()
    optimizer = torch.optim.Adam([{"params": [tensor.requires_grad_()], "lr": 0.05 * pace} for tensor, pace in pairs])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    for _ in range(150):
        optimizer.zero_grad()
        (learner.weight() - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert (learner.finish().dense() - target).square().sum() < 0.7 * (code.dense() - target).square().sum()


@pytest.mark.parametrize("kind", ["integers", "trits"])
def test_pruned_weights_stay_zero(kind: str) -> None:
    weight = weights(4)
    frozen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    weight = weight.masked_fill(frozen, 0)
    learner = LEARNERS[kind](code_of(kind, weight), weight)
    for tensor, pace in learner.parameters():
        tensor.add_(pace * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(6)))
    kept = learner.finish().dense()
    zero = weight == 0
    if kind == "trits":
        zero &= code_of(kind, weight).dense() == 0
    assert not kept[zero].any()


def test_learned_planes_are_canonical() -> None:
    weight = weights(7)
    learner = TritLearner(code_of("trits", weight), weight)
    learner.scale.copy_(learner.scale.flip(0))
    learner.scale[0, ::2].neg_()
    before = learner.weight()
    code = learner.finish()
    assert isinstance(code, TritPlanes)
    assert (code.scale >= 0).all() and (code.scale[0] >= code.scale[1]).all()
    assert torch.equal(code.dense(), before)


@pytest.mark.parametrize("kind", ["signs", "signs without means"])
def test_salient_weights_rest_and_scales_follow_the_weights(kind: str) -> None:
    weight = weights(8)
    code = code_of(kind, weight)
    assert isinstance(code, PartialBinary) and (code.mean is None) is (kind == "signs without means")
    learner = SignLearner(code, weight)
    learner.latent.mul_(2)  # every distance doubles, and with it every scale
    after = learner.finish()
    assert torch.equal(after.codes, code.codes) and torch.equal(after.step, code.step)
    assert torch.allclose(after.scale.float(), 2 * code.scale.float(), rtol=2e-3)
    learner.latent.requires_grad_(True)
    learner.weight().square().sum().backward()
    assert learner.latent.grad is not None
    assert not learner.latent.grad[code.salient].any()
    assert learner.latent.grad[~code.salient].abs().min() > 0
