"""Experts taken apart compute what the fused module computes."""

from __future__ import annotations

import pytest
import torch
from packed_folders import tiny_model
from torch import nn

from compressor.hf.experts import UnfusedExperts, unfuse


def fused_experts() -> nn.Module:
    experts = tiny_model("qwen3_moe").model.layers[0].mlp.experts
    experts.config._experts_implementation = "eager"
    return experts  # type: ignore[no-any-return]


def test_outputs_are_those_of_the_fused_module() -> None:
    fused = fused_experts()
    apart = UnfusedExperts.from_fused(fused)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 32, generator=generator)
    index = torch.rand(24, 3, generator=generator).argsort(-1)[:, :2]  # expert 3 is starved
    weights = torch.rand(24, 2, generator=generator)
    called = []
    for name, module in apart.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(apart(x, index, weights), fused(x, index, weights), rtol=1e-5, atol=1e-6)
    assert called == ["0", "1", "2"]
    assert apart(x, torch.full_like(index, 4), weights).abs().max() == 0  # numbers that are no expert are ignored


def test_unfuse_names_the_modules_and_copies_the_weights() -> None:
    model = tiny_model("qwen3_moe")
    fused = model.model.layers[1].mlp.experts
    ids = torch.arange(20)[None]
    before = model(ids).logits
    assert unfuse(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert unfuse(model) == []
    names = dict(model.named_modules())
    gate = names["model.layers.1.mlp.experts.3.gate_proj"]
    assert isinstance(gate, nn.Linear) and torch.equal(gate.weight, fused.gate_up_proj[3, :16])
    assert torch.equal(names["model.layers.1.mlp.experts.2.up_proj"].weight, fused.gate_up_proj[2, 16:])
    assert torch.equal(names["model.layers.1.mlp.experts.0.down_proj"].weight, fused.down_proj[0])
    storages = {p.untyped_storage().data_ptr() for p in names["model.layers.1.mlp.experts"].parameters()}
    assert len(storages) == 12
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_meta_device_and_dense_models() -> None:
    fused = fused_experts().to("meta")
    assert all(p.is_meta for p in UnfusedExperts.from_fused(fused).parameters())
    assert unfuse(tiny_model("llama")) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_transposed": True}, "is_transposed is True"),
        ({"has_gate": False}, "has_gate is False"),
        ({"is_concatenated": False}, "is_concatenated is False"),
        ({"gate_up_proj_bias": nn.Parameter(torch.zeros(4, 32))}, "its parameters are"),
        ({"down_proj": nn.Parameter(torch.zeros(4, 16, 32))}, "are not"),
    ],
)
def test_other_kinds_are_refused_before_anything_is_changed(change: dict[str, object], reason: str) -> None:
    model = tiny_model("qwen3_moe")
    for key, value in change.items():
        setattr(model.model.layers[1].mlp.experts, key, value)
    with pytest.raises(ValueError, match=rf"model.layers.1.mlp.experts: .*Qwen3MoeExperts cannot .*{reason}"):
        unfuse(model)
    assert not isinstance(model.model.layers[0].mlp.experts, UnfusedExperts)
