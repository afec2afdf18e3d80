"""Exported integers in stock transformers, in a process that has never heard of compressor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import integer_models
import pytest
import repacked
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.run.export_compressed_tensors import export_compressed_tensors

STOCK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(load_file(sys.argv[1])["ids"], use_cache=False).logits
    weights = {name: p.clone() for name, p in model.named_parameters()}
    save_file({"logits": logits, **weights}, folder + "/found")
assert "compressor" not in sys.modules
"""

Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Name -> (packed, exported), the latter with what one process of stock transformers found: logits and weights."""
    base = tmp_path_factory.mktemp("exported")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        source = integer_models.source(base / f"{name}-source", dtype=dtype)
        repacked.repack(source, base / name, integer_models.mixed)
    stage = {"quantize": {"method": "rtn", "bits": 4, "group": 32, "asymmetric": True, "embeddings": 8}}
    recipe = tiny_models.recipe_for(calibration, stage)
    tiny_models.run_recipe(recipe, base / "float32-source", base / "embeddings")
    made = {name: (base / name, base / f"{name}-out") for name in ("float32", "bfloat16", "embeddings")}
    for name, (packed, out) in made.items():
        done = export_compressed_tensors(str(packed), out, verify=False)
        assert done.exact and "matrices with zero points are stored with one more bit" in done.notes[0]
        assert ("model.embed_tokens is stored dense" in "".join(done.notes)) is (name == "embeddings")
        assert done.matrices == (14 if name == "embeddings" else 10)
    save_file({"ids": integer_models.IDS}, base / "ids")
    command = [sys.executable, "-c", STOCK, str(base / "ids"), *(str(out) for _, out in made.values())]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, env=env, cwd=base)
    return made


@pytest.mark.parametrize("name", ["float32", "bfloat16", "embeddings"])
@pytest.mark.usefixtures("by_the_package")
def test_stock_transformers_finds_the_same_weights_and_logits(name: str, folders: Folders) -> None:
    packed, out = folders[name]
    ours = AutoModelForCausalLM.from_pretrained(packed).eval()
    with torch.no_grad():
        logits: Tensor = ours(integer_models.IDS, use_cache=False).logits
    found = load_file(out / "found")
    for path, module in ours.named_modules():
        if hasattr(module, "unpacked"):
            assert torch.equal(found[f"{path}.weight"], module.unpacked()), path
    assert torch.equal(found["logits"], logits)
