"""Corrections taken out of a folder: with PEFT the same logits, without it those of the codes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import repacked
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.errors import UserError
from compressor.formats import Representation, Sum
from compressor.formats.dense import Dense
from compressor.report.contents import read_contents
from compressor.run.adapter import split_adapter

STAGES: dict[str, dict[str, Any]] = {
    "integers": {"method": "rtn", "bits": 2, "group": 16, "correct": 3},
    "narrow": {"method": "rtn", "bits": 2, "group": 16, "correct": 40, "include": ["q_proj", "k_proj"]},
    "trits": {"method": "trit-planes", "planes": 1, "group": 16, "correct": 4, "correct_bits": 8},
}


def corrected(family: str, stage: dict[str, Any], calibration: Path, folder: Path) -> Path:
    source = tiny_models.save(tiny_models.random_model(family), folder / "source")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, {"quantize": stage}), source, folder / "corrected")
    return folder / "corrected"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_models.random_ids(2)).logits


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in STAGES), ("gpt2", "integers"), ("gpt2", "trits")]
)
def test_adapter_and_folder_together_are_the_source(kind: str, family: str, calibration: Path, tmp_path: Path) -> None:
    source = corrected(family, STAGES[kind], calibration, tmp_path)
    split = split_adapter(str(source), tmp_path / "apart")
    wanted = logits(AutoModelForCausalLM.from_pretrained(source))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    alone = logits(base)
    together = logits(PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter"))
    assert (alone - wanted).abs().max() > 1e-3
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-4)
    adapter = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * split.corrections
    assert split.adapter_bytes == sum(tensor.numel() * tensor.itemsize for tensor in adapter.values())
    stock = json.loads((tmp_path / "apart" / "config.json").read_text())["model_type"] == "llama"
    assert stock is (family == "llama" and kind != "trits")
    assert (tmp_path / "apart" / "modeling_compressor.py").exists() is not stock


def half_and_rest(dtype: torch.dtype) -> repacked.Code:
    """Every linear as a low-rank term and a dense base in ``dtype`` that makes up for it."""

    def code(name: str, weight: torch.Tensor) -> Representation:
        term = repacked.truncated(weight, 3 if "0" in name else 5)
        return Sum(Dense((weight.float() - term.dense()).to(dtype)), term)

    return code


def thin(name: str, weight: torch.Tensor) -> Representation:
    return repacked.truncated(weight, 3 if "0" in name else 5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("kind", ["dense bases", "matrices"])
def test_a_plain_checkpoint_is_left_of_dense_bases_and_of_matrices(kind: str, family: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if family == "llama" else torch.float32
    model = tiny_models.random_model(family, dtype=dtype)
    source = tiny_models.save(model, tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", thin if kind == "matrices" else half_and_rest(dtype))
    items = [item for item in read_contents(folder).items if item.group == "compressed linears"]
    assert (
        {item.format for item in items} == {"low-rank"} if kind == "matrices" else {"dense + rank 3", "dense + rank 5"}
    )
    split = split_adapter(str(folder), tmp_path / "apart")
    assert split.corrections == len(items)
    assert not list(tmp_path.glob("*.partial"))

    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    assert config == before and "quantization_config" not in config
    assert not (tmp_path / "apart" / "modeling_compressor.py").exists()
    stored, originals = (load_file(path / "model.safetensors") for path in (tmp_path / "apart", source))
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        name: (t.dtype, t.shape) for name, t in originals.items()
    }
    if kind == "matrices":
        touched = [name for name, tensor in stored.items() if not torch.equal(tensor, originals[name])]
        assert len(touched) == split.corrections and not any(stored[name].any() for name in touched)

    base = type(model).from_pretrained(tmp_path / "apart", dtype=torch.float32)  # the stock class, nothing of ours
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    alone = logits(base)
    together = PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter")
    allowed = 1e-4 if dtype == torch.float32 else 2e-2  # our folder rounds its sums to the model's dtype
    assert (alone - wanted).abs().max() > 0.1
    torch.testing.assert_close(logits(together), wanted, rtol=allowed, atol=allowed)
    torch.testing.assert_close(logits(together.merge_and_unload()), wanted, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("components", ["largest", "smallest"])
def test_a_product_beside_its_residual(components: str, family: str, calibration: Path, tmp_path: Path) -> None:
    """A plain checkpoint and an adapter for stock peft; together they are the source, before any fine-tuning."""
    model = tiny_models.random_model(family)
    source = tiny_models.save(model, tmp_path / "source")
    stage = {"method": "corda", "rank": 3, "components": components}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, {"decompose": stage}), source, tmp_path / "out")
    split_adapter(str(tmp_path / "out"), tmp_path / "apart")
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["model_type"] == family
    base = type(model).from_pretrained(tmp_path / "apart")
    wanted = logits(type(model).from_pretrained(source))
    alone = logits(base)
    together = PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter")
    assert (alone - wanted).abs().max() > 1e-3
    torch.testing.assert_close(logits(together), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(together.merge_and_unload()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_terms_of_every_kind_in_one_folder(family: str, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model(family), tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", repacked.everything)
    split_adapter(str(folder), tmp_path / "apart")
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert (logits(base) - wanted).abs().max() > 0.1  # also: compressed-tensors makes its weights when it first runs
    together = PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter")
    torch.testing.assert_close(logits(together), wanted, rtol=1e-4, atol=1e-4)
    kinds = {item.format.split(",")[0] for item in read_contents(tmp_path / "apart").items}
    assert not any("low-rank" in kind or "rank 4" in kind for kind in kinds)


def test_what_cannot_be_taken_apart_is_refused(calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "plain")
    with pytest.raises(UserError, match=r"no low-rank corrections.*--correct.*compressor decompose"):
        split_adapter(str(source), tmp_path / "out")
    experts = corrected("qwen3_moe", {"method": "rtn", "bits": 4, "correct": 2}, calibration, tmp_path / "moe")
    with pytest.raises(UserError, match="PEFT cannot adapt"):
        split_adapter(str(experts), tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    dense = corrected("llama", STAGES["integers"], calibration, tmp_path / "llama")
    with pytest.raises(UserError, match="was not written by compressor"):
        split_adapter(str(dense), tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "moe", "plain", "there"]
