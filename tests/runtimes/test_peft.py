"""LoRA beside packed layers, by PEFT: it trains, is saved, comes back, and is never merged without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import tiny_models
import torch
from foreign import need_package
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.hf.fast import accelerate
from compressor.kernels.native import LEVELS, rung

IDS = integer_models.IDS
KINDS: dict[str, Any] = {
    "every format": repacked.everything,
    "integers": integer_models.mixed,
    "trits": lambda _, weight: integer_models.trits(weight, 32, planes=2),
}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of this machine, as a user has them; skipped where there are none."""
    monkeypatch.setenv("COMPRESSOR_KERNELS", "auto")
    if (found := rung()) not in LEVELS:
        pytest.skip(f"no kernels here ({found})")
    return found


def fast_layers(model: Any) -> tuple[int, int]:
    """How many layers the kernels multiply, and how many of them hold no second copy."""
    packed = [module for module in model.modules() if getattr(module, "fast", None) is not None]
    return len(packed), sum(bool(module.released) for module in packed)


def adapted(model: Any, folder: Path | None = None) -> Any:
    """The model with an adapter, fresh or from a folder."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if folder is not None:
        return PeftModel.from_pretrained(model, folder).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(model: Any, steps: int = 10) -> list[float]:
    """Losses; every gradient is checked to be an adapter's."""
    learned = [p for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad) and learned
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(learned, 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None for p in learned)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in before.items())
    return losses


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.usefixtures("by_the_package")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_beside_fast_layers(kind: str, fast: str, tmp_path: Path) -> None:
    need_package("peft")
    source = integer_models.source(tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (count := fast_layers(model))[0] > 5 and count[1] > 0
    trained = adapted(model)
    losses = train(trained)
    assert losses[-1] < 0.6 * losses[0]
    trained.save_pretrained(tmp_path / "adapter")
    wanted = logits(trained)
    again = adapted(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert fast_layers(trained) == fast_layers(again) == count  # neither saving nor loading has cost any
    assert torch.equal(logits(again), wanted)

    with pytest.raises(RuntimeError, match=r"cannot be written: call model\.dequantize\(\) first"):
        again.merge_and_unload()
    dense = adapted(AutoModelForCausalLM.from_pretrained(folder).dequantize(), tmp_path / "adapter")
    merged = dense.merge_and_unload()
    accelerate(again, "packed")  # without rounding of activations
    torch.testing.assert_close(logits(merged), logits(again), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("by_the_package")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_fast_layers_are_those_of_the_dense_model(kind: str, fast: str, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", KINDS[kind])
    packed, dense = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    dense = dense.dequantize()
    found = []
    for model in (packed, dense):
        model.requires_grad_(False)
        x = model.get_input_embeddings()(IDS).requires_grad_()
        model(inputs_embeds=x, labels=IDS, use_cache=False).loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("by_the_package")
def test_a_linearized_model_takes_an_adapter(tmp_path: Path, calibration: Path, fast: str) -> None:
    need_package("peft")
    source = integer_models.source(tmp_path / "source")
    stage = {"linearize": {"method": "windowed", "window": 6, "sinks": 2, "tokens": 8 * 24, "keep_attention": 1}}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), source, tmp_path / "linear")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "linear")
    trained = adapted(model)
    losses = train(trained)
    assert losses[-1] < 0.6 * losses[0]
    trained.save_pretrained(tmp_path / "adapter")
    again = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "linear"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(trained), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(trained), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["dequantized while loading", "after a first run", "at once"])
def test_a_folder_of_compressed_tensors(how: str, tmp_path: Path) -> None:
    """Its layers have no weight until the model has run once; PEFT wants to see one before."""
    need_package("peft")
    source = integer_models.source(tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", lambda _, w: integer_models.rounded(w, bits=4, group=32))
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "loading" in how else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **more)
    if how == "after a first run":
        logits(model)
    if how == "at once":
        with pytest.raises(AttributeError, match="has no attribute 'weight'"):
            adapted(model)
        return
    losses = train(adapted(model))
    assert losses[-1] < 0.6 * losses[0]
