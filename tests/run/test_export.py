"""A packed folder written as a plain checkpoint: the source's names and dtypes, the packed layers' weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import repacked
import tiny_models
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.report.files import read_report
from compressor.run.export_dense import export_dense, names_of_experts

IDS = tiny_models.random_ids(2)


def check(packed: Path, plain: Path, source: Path, model: Any, allowed: float = 2e-4) -> None:
    """Compare an exported folder with the packed one and with the source of both."""
    assert json.loads((plain / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert not (plain / "modeling_compressor.py").exists()
    assert (plain / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written, wanted = load_file(plain / "model.safetensors"), load_file(source / "model.safetensors")
    facts = [{name: (t.dtype, t.shape) for name, t in tensors.items()} for tensors in (written, wanted)]
    assert facts[0] == facts[1]
    ours, theirs = (build_skeleton(open_checkpoint(folder)) for folder in (packed, plain))
    assert not theirs.packed and not theirs.extra
    for name in ours.origins:
        assert torch.equal(theirs.read(name), ours.read(name)), name
    loaded, info = type(model).from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values()), info
    close(logits(loaded), tiny_models.streamed_logits(packed, IDS), allowed)
    assert (logits(loaded) - logits(model.float())).abs().max() > 1e-3  # something was lost in packing


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def close(one: Tensor, other: Tensor, allowed: float) -> None:
    assert float((one - other).abs().max()) <= allowed * float(other.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "opt", "phi3", "qwen3_moe", "mixtral"])
def test_every_format_and_family(family: str, tmp_path: Path) -> None:
    model = tiny_models.random_model(family, dtype=torch.bfloat16 if family == "llama" else torch.float32)
    source = tiny_models.save(model, tmp_path / "source")
    packed = repacked.repack(source, tmp_path / "packed", repacked.everything)
    before = tiny_models.digest(packed)
    done = export_dense(str(packed), tmp_path / "plain", verify=False)
    check(packed, tmp_path / "plain", source, model)
    assert done.matrices == len(build_skeleton(open_checkpoint(packed)).packed) > 3
    assert done.tensor_bytes == sum(t.nbytes for t in load_file(tmp_path / "plain" / "model.safetensors").values())
    assert tiny_models.digest(packed) == before and not list(tmp_path.glob("*.partial"))
    read = logits(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32))
    # of a low-rank layer, only the export rounds the matrix to the model's dtype
    close(logits(type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32)), read,
          2e-2 if family == "llama" else 2e-4)  # fmt: skip


def test_integers_of_compressed_tensors(tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", dtype=torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "source")
    packed = repacked.repack(source, tmp_path / "packed", lambda _, weight: repacked.integers(weight))
    assert json.loads((packed / "config.json").read_text())["model_type"] == "llama"
    assert export_dense(str(packed), tmp_path / "plain", verify=False).matrices == 14
    check(packed, tmp_path / "plain", source, model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_tied_to_the_head(family: str, calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model(family)
    source = tiny_models.save(model, tmp_path / "source")
    stage = {"quantize": {"method": "rtn", "bits": 4, "group": 16, "embeddings": 8}}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), source, tmp_path / "packed")
    export_dense(str(tmp_path / "packed"), tmp_path / "plain", verify=False)
    check(tmp_path / "packed", tmp_path / "plain", source, model)
    names = set(load_file(tmp_path / "plain" / "model.safetensors"))
    assert "lm_head.weight" not in names and not any(".weight_" in name for name in names)
    exported = read_report(tmp_path / "plain").exported
    assert exported is not None and (exported.form, exported.exact) == ("dense", True)
    assert exported.file_bytes == (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert "from_pretrained" in (tmp_path / "plain" / "README.md").read_text()


def test_experts_go_back_into_fused_tensors_where_transformers_expects_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.random_model("qwen3_moe")
    assert len(names_of_experts(model)) == 3  # its files hold experts apart
    monkeypatch.setattr("compressor.run.export_dense.names_of_experts", lambda _: [])
    source = tiny_models.save(model, tmp_path / "source")
    packed = repacked.repack(source, tmp_path / "packed", repacked.everything)
    export_dense(str(packed), tmp_path / "plain", verify=False)
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert not any(".experts.0." in name for name in written)
    ours = build_skeleton(open_checkpoint(packed))
    for number in range(8):
        expert = f"model.layers.1.mlp.experts.{number}"
        gate, up, down = (ours.read(f"{expert}.{part}_proj.weight") for part in ("gate", "up", "down"))
        assert torch.equal(written["model.layers.1.mlp.experts.gate_up_proj"][number], torch.cat([gate, up]))
        assert torch.equal(written["model.layers.1.mlp.experts.down_proj"][number], down)
    loaded, info = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values()), info
    close(logits(loaded), tiny_models.streamed_logits(packed, IDS), 2e-4)


def test_large_checkpoints_stay_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.random_model("llama")
    packed = repacked.repack(tiny_models.save(model, tmp_path / "source"), tmp_path / "packed", repacked.everything)
    monkeypatch.setattr("compressor.engine.output.ONE_FILE", 0)
    export_dense(str(packed), tmp_path / "plain", verify=False)
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    close(logits(type(model).from_pretrained(tmp_path / "plain")), tiny_models.streamed_logits(packed, IDS), 2e-4)


def test_what_cannot_be_exported_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a plain checkpoint already"):
        export_dense(str(llama), tmp_path / "out")
    packed = repacked.repack(llama, tmp_path / "packed", repacked.everything)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_dense(str(packed), tmp_path / "there")
    with pytest.raises(UserError, match="input folder"):
        export_dense(str(packed), packed / "inside")
    (packed / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="missing or does not fit"):
        export_dense(str(packed), tmp_path / "out")
    encoder = tmp_path / "encoder"
    transformers.T5Config(d_model=16, num_layers=1, num_heads=2).save_pretrained(encoder)
    (encoder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="encoder-decoder"):
        export_dense(str(encoder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "packed", "there"]
