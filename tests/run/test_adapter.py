"""Corrections taken out of a folder: with PEFT the same logits, without it those of the codes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.errors import UserError
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


def test_what_cannot_be_taken_apart_is_refused(calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "plain")
    with pytest.raises(UserError, match=r"no low-rank corrections.*--correct"):
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
