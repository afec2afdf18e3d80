"""Packed models in ``torch.compile`` and ``torch.export``: the same logits as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.hf.caches import cache_name, read_on

pytestmark = pytest.mark.slow  # tracing a whole model takes its time

IDS = integer_models.IDS
KINDS: dict[str, Any] = {
    "every format": repacked.everything,
    "integers": integer_models.mixed,
    "trits": lambda _, weight: integer_models.trits(weight, 32, planes=2),
}


class Logits(nn.Module):
    """A model as a function of tokens alone, as graphs want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.fixture(params=["packed", "auto"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COMPRESSOR_KERNELS", request.param)
    torch._dynamo.reset()
    return str(request.param)


def loaded(kind: str, tmp_path: Path) -> tuple[Logits, Tensor]:
    source = integer_models.source(tmp_path / "source", num_hidden_layers=1)
    folder = repacked.repack(source, tmp_path / "packed", KINDS[kind])
    model = Logits(AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False))
    with torch.no_grad():
        return model, model(IDS)


def agree(found: Tensor, want: Tensor) -> None:
    """A graph calls the same kernels; only what lies between them may round otherwise, and move an int8 by one."""
    assert (found - want).abs().max() <= 2e-3 * want.abs().max()


@pytest.mark.usefixtures("by_the_package", "kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str, tmp_path: Path) -> None:
    model, want = loaded(kind, tmp_path)
    with torch.no_grad():
        agree(torch.compile(model, backend="aot_eager")(IDS), want)


@pytest.mark.usefixtures("by_the_package")
@pytest.mark.parametrize("kind", ["integers", "trits"])
def test_compile_to_train(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients the matrices are unpacked, from layouts where nothing else is held."""
    monkeypatch.setenv("COMPRESSOR_KERNELS", "auto")
    torch._dynamo.reset()
    model, _ = loaded(kind, tmp_path)
    inner: Any = model.model
    embedding = inner.get_input_embeddings().weight.requires_grad_()
    gradients = []
    for each in (model, torch.compile(model, backend="aot_eager")):
        embedding.grad = None
        each(IDS).square().mean().backward()
        assert embedding.grad is not None and embedding.grad.abs().max() > 0
        gradients.append(embedding.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))


@pytest.mark.usefixtures("by_the_package")
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels. Without them a layer checks its parts when it unpacks, which cannot be traced."""
    monkeypatch.setenv("COMPRESSOR_KERNELS", "auto")
    model, want = loaded(kind, tmp_path)
    with torch.no_grad():
        agree(torch.export.export(model, (IDS,)).module()(IDS), want)


@pytest.mark.usefixtures("by_the_package", "kernels")
def test_inductor(tmp_path: Path) -> None:
    model, want = loaded("integers", tmp_path)
    with torch.no_grad():
        agree(torch.compile(model)(IDS), want)


@pytest.mark.usefixtures("by_the_package")
def test_a_token_after_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding with a static cache is one graph, and attention one node of it."""
    monkeypatch.setenv("COMPRESSOR_KERNELS", "auto")
    monkeypatch.setenv("COMPRESSOR_ACTIVATIONS", "exact")  # one token is rounded otherwise than several
    torch._dynamo.reset()
    source = integer_models.source(tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", KINDS["trits"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[str] = []

    def keep(graph: Any, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        want = model(IDS).logits
        cache = StaticCache(config=model.config, max_cache_len=40)
        read_on(model, cache, input_ids=IDS[:, :7])
        step = torch.compile(model, backend=keep, fullgraph=True)
        for place in range(7, 10):
            token, position = IDS[:, place : place + 1], torch.tensor([[place]])
            agree(step(token, position_ids=position, **{cache_name(type(model)): cache}).logits[:, 0], want[:, place])
    calls = sum("native_attention" in name for name in found)
    assert calls and calls % model.config.num_hidden_layers == 0
    assert not any("scaled_dot_product" in name for name in found)
