"""Gradients of the loss, one block at a time, against those of the whole model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from compressor.engine.backward import loss_backward, seen_linears

FAMILIES = ["llama", "gpt2", "gemma2", "neox", "qwen3_moe"]


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_outputs_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """Second moments of what every linear is given and of what its output is worth; and the loss itself."""
    folder = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    runner, ids = tiny_models.open_runner(folder), tiny_models.random_ids(5)
    linears = [linear for linear in runner.skeleton.linears if ".experts." not in linear.name]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, x: Tensor, g: Tensor) -> None:
        before = seen.get(name, (torch.zeros(()), torch.zeros(())))
        seen[name] = before[0] + x.T @ x, before[1] + g.T @ g

    def around(block: int) -> Any:
        return seen_linears(runner, [linear for linear in linears if linear.block == block], see)

    stream = runner.start(ids)
    stream.batch = 2
    stream.calls = [runner.start(ids[i : i + 2]).calls[0] for i in range(0, 5, 2)]
    loss = loss_backward(runner, stream, tmp_path, weights=lambda block: {}, around=around)

    model, wanted = whole(folder), {}
    for linear in linears:
        module = model.get_submodule(linear.name)

        def keep(_: Any, args: tuple[Tensor, ...], out: Tensor, name: str = linear.name) -> None:
            out.retain_grad()
            wanted[name] = args[0].detach().flatten(0, -2), out

        module.register_forward_hook(keep)
    total = loss_of(model(input_ids=ids, use_cache=False).logits, ids)
    total.backward()
    assert loss == pytest.approx(float(total.detach()) / (5 * (tiny_models.LENGTH - 1)), rel=1e-5)
    assert seen.keys() == wanted.keys()
    for name, (x, out) in wanted.items():
        assert out.grad is not None
        g = out.grad.flatten(0, -2)
        assert torch.allclose(seen[name][0], x.T @ x, rtol=1e-3, atol=1e-4 * float((x.T @ x).abs().max())), name
        assert torch.allclose(seen[name][1], g.T @ g, rtol=1e-3, atol=1e-4 * float((g.T @ g).abs().max())), name
    assert not list(tmp_path.glob("entering*"))  # what lay on disk is gone


def test_gradients_reach_what_the_weights_depend_on(tmp_path: Path) -> None:
    """A scale on two matrices of different blocks."""
    folder = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "model")
    runner, ids = tiny_models.open_runner(folder), tiny_models.random_ids(4)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    scales = torch.tensor([0.9, 1.1], requires_grad=True)

    def weights(block: int) -> dict[str, Tensor]:
        name = names[block]
        return {name: runner.loaded(name) * scales[block]}

    loss_backward(runner, runner.start(ids), tmp_path, weights=weights)
    model, again = whole(folder), scales.detach().clone().requires_grad_(True)
    replaced = {name: model.get_parameter(name).detach() * again[i] for i, name in enumerate(names)}
    out = functional_call(model, replaced, kwargs={"input_ids": ids, "use_cache": False})
    loss_of(out.logits, ids).backward()
    assert scales.grad is not None and again.grad is not None
    assert torch.allclose(scales.grad, again.grad, rtol=1e-3)


def test_sampled_tokens_are_the_model_s_own(tmp_path: Path) -> None:
    """On a model that is sure of one token, the sampled loss is nothing, whatever the windows say."""
    model = tiny_models.random_model("neox")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(10.0)
    runner = tiny_models.open_runner(tiny_models.save(model, tmp_path / "model"))
    ids = tiny_models.random_ids(3)
    generator = torch.Generator().manual_seed(0)
    own = loss_backward(runner, runner.start(ids), tmp_path, weights=lambda block: {}, sampled=generator)
    text = loss_backward(runner, runner.start(ids), tmp_path, weights=lambda block: {})
    assert own < 1e-3 < 1.0 < text
