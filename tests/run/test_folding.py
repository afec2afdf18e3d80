"""Scales are folded into what makes an input, found by numbers, and the block computes what it did."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from compressor.engine.observe import observe
from compressor.engine.producers import find_folds
from compressor.formats import Masked
from compressor.methods.quadratic import layer_error
from compressor.run import folding
from compressor.run.recipe import make_stage
from compressor.run.transform import BlockWork, open_block

NORMS = {"self_attn.q_proj": ("input_layernorm", "norm"), "mlp.gate_proj": ("post_attention_layernorm", "norm")}
INSIDE = {"self_attn.o_proj": ("self_attn.v_proj", "linear"), "mlp.down_proj": ("mlp.up_proj", "linear")}
OFFSET = {
    "self_attn.q_proj": ("input_layernorm", "offset norm"),
    "mlp.gate_proj": ("pre_feedforward_layernorm", "offset norm"),
}
ATTENTION = {"self_attn.q_proj": ("input_layernorm", "norm"), "self_attn.o_proj": ("self_attn.v_proj", "linear")}
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "llama": NORMS | INSIDE,
    "qwen2": NORMS | INSIDE,
    "qwen3": NORMS | INSIDE,
    "gemma2": OFFSET | INSIDE,
    "gemma3": OFFSET | INSIDE,
    "phi3": {
        "self_attn.qkv_proj": ("input_layernorm", "norm"),
        "self_attn.o_proj": ("self_attn.qkv_proj", "linear"),
        "mlp.gate_up_proj": ("post_attention_layernorm", "norm"),
        "mlp.down_proj": ("mlp.gate_up_proj", "linear"),
    },
    "gpt2": {  # what enters mlp.c_proj has been through a GELU
        "attn.c_attn": ("ln_1", "norm"),
        "attn.c_proj": ("attn.c_attn", "linear"),
        "mlp.c_fc": ("ln_2", "norm"),
    },
    "neox": {  # values lie between queries and keys, head by head
        "attention.query_key_value": ("input_layernorm", "norm"),
        "mlp.dense_h_to_4h": ("post_attention_layernorm", "norm"),
    },
    "opt": {
        "self_attn.k_proj": ("self_attn_layer_norm", "norm"),
        "self_attn.out_proj": ("self_attn.v_proj", "linear"),
        "fc1": ("final_layer_norm", "norm"),
        "fc2": ("fc1", "linear"),  # a rectifier lets scales pass
    },
    # the router reads the norm as well
    "qwen3_moe": {**ATTENTION, "mlp.experts.*.down_proj": ("mlp.experts.*.up_proj", "linear")},
    "mixtral": {**ATTENTION, "mlp.experts.*.down_proj": ("mlp.experts.*.up_proj", "linear")},
}


class Opened:
    """The second block of a tiny model, loaded, with the statistics of its inputs."""

    def __init__(self, family: str, folder: Path, **more: Any) -> None:
        folder = tiny_models.save(tiny_models.random_model(family, **more), folder / "model")
        self.runner = tiny_models.open_runner(folder)
        self.stream = self.runner.start(tiny_models.random_ids(32))
        self.runner.load_block(0)
        self.runner.step(0, self.stream)
        self.linears = [linear for linear in self.runner.skeleton.linears if linear.block == 1]
        self.runner.load_block(1)
        self.work: BlockWork = open_block(self.runner.skeleton, self.linears)
        self.seen = observe(self.runner, 1, self.linears, self.stream)

    def output(self) -> Tensor:
        return torch.cat([self.runner.forward(1, self.stream, *batch) for batch in self.stream.batches()])

    def fold(self, **settings: Any) -> None:
        stage = make_stage("quantize", {"method": "awq", "bits": 3, "group": 16, **settings})
        folding.fold_scales(stage, self.linears, self.work, self.seen, self.runner, 1, self.stream)


def random_scales(readers: Any, hessian: Tensor, source: Tensor, steps: int) -> Tensor:
    return torch.randn(int(source.max()) + 1, generator=torch.Generator().manual_seed(len(hessian)))


@pytest.mark.parametrize("family", EXPECTED)
def test_producers_are_found_by_numbers(family: str, tmp_path: Path) -> None:
    opened = Opened(family, tmp_path)
    shared = folding._shared(opened.linears, opened.seen, 1)
    found: dict[str, tuple[str, str]] = {}
    for fold in find_folds(opened.runner, 1, opened.stream, shared, opened.linears):
        prefix = opened.runner.skeleton.block_names[1] + "."
        module = re.sub(r"\.\d+\.", ".*.", fold.producer.module.removeprefix(prefix))
        assert found.setdefault(fold.readers[0].kind, (module, fold.producer.form)) == (module, fold.producer.form)
    assert found == EXPECTED[family]


def test_heads_that_share_a_value_share_a_scale(tmp_path: Path) -> None:
    opened = Opened("llama", tmp_path)
    shared = [[linear for linear in opened.linears if linear.kind == "self_attn.o_proj"]]
    (fold,) = find_folds(opened.runner, 1, opened.stream, shared, opened.linears)
    heads = torch.arange(16).view(2, 1, 8).expand(2, 2, 8)  # 4 heads of 8, two to a value
    assert torch.equal(fold.source, heads.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", EXPECTED)
def test_the_block_computes_what_it_did(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "find_scales", random_scales)
    opened = Opened(family, tmp_path, dtype=dtype)
    before, weights = opened.output(), {name: weight.clone() for name, weight in opened.work.originals.items()}
    kept = {name: seen.hessian.clone() for name, seen in opened.seen.statistics.items()}
    opened.fold()
    biased = dtype == torch.bfloat16 and any(name.endswith("bias") for name in opened.work.folded)
    close = 3e-2 if biased else 1e-5  # a bias is rounded to the dtype it is stored in
    torch.testing.assert_close(opened.output(), before, rtol=close, atol=close)
    assert not torch.equal(opened.output(), before)
    assert opened.work.folded
    for name, value in opened.work.folded.items():
        stored = opened.runner.skeleton.read(name)
        assert value.dtype == stored.dtype == dtype and value.shape == stored.shape
        assert not torch.equal(value, stored) and torch.equal(opened.work.unfolded[name], stored)
    changed = 0
    for linear in opened.linears:
        weight, now = weights[linear.name].float(), opened.work.originals[linear.name].float()
        changed += not torch.equal(weight, now)
        hessian = opened.seen.statistics[linear.name].hessian
        columns = (hessian.diagonal() / kept[linear.name].diagonal()).sqrt().nan_to_num(1.0)
        rows = (now.norm(dim=1) / (weight / columns).norm(dim=1))[:, None]
        torch.testing.assert_close(now, weight / columns * rows, rtol=1e-3, atol=1e-5)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.abs().mean()
        if torch.allclose(rows, torch.ones_like(rows), rtol=1e-4):  # what it gives is not scaled
            then = layer_error(weight, weight + noise, kept[linear.name])[1]
            assert layer_error(now, now + noise / columns, hessian)[1] == pytest.approx(then, rel=1e-3)
    assert changed >= len(opened.linears) / 2


def test_zeros_stay_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "find_scales", random_scales)
    opened = Opened("llama", tmp_path)
    for name, weight in opened.work.originals.items():
        mask = weight.abs() > weight.abs().median()
        opened.work.weights[name] = Masked(weight.masked_fill(~mask, 0), mask)
    masks = {name: code.mask for name, code in opened.work.weights.items() if isinstance(code, Masked)}
    opened.fold()
    assert opened.work.folded
    for name, code in opened.work.weights.items():
        assert isinstance(code, Masked) and code.mask is masks[name]
        assert torch.equal(code.dense() != 0, masks[name])


def test_linears_that_are_left_out_are_not_scaled(tmp_path: Path) -> None:
    """k_proj is not to be touched, so the norm before it cannot be; down_proj's producer is not either."""
    opened = Opened("llama", tmp_path)
    everything = opened.linears
    opened.linears = [x for x in everything if x.kind not in ("self_attn.k_proj", "mlp.up_proj")]
    opened.fold()
    assert not any("input_layernorm" in name for name in opened.work.folded)
    notes = {x.kind: opened.work.layers[x.name].get("notes", []) for x in everything}
    for kind in ("self_attn.q_proj", "mlp.gate_proj"):
        assert notes[kind] == [folding.NOT_FOLDED]
    assert not notes["self_attn.k_proj"] and not notes["mlp.up_proj"]
