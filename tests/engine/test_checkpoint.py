"""Opening checkpoints: sharded, pickled, damaged, with tensors too many or too few."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError

INDEX = "model.safetensors.index.json"
HALF = {"method": "magnitude", "sparsity": 0.5}


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama in several shards."""
    model = tiny_models.random_model("llama")
    folder = tiny_models.save(model, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def reindex(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Change the weight map of a sharded checkpoint in place."""
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def reconfigure(folder: Path, **changes: Any) -> None:
    """Change config.json in place."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def refused(folder: Path, *words: str) -> None:
    """Opening and matching the checkpoint ends in one line that has these words."""
    with pytest.raises(UserError) as caught:
        build_skeleton(open_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sharded_and_single_files_give_the_same_bytes(llama: Path, sharded: Path, tmp_path: Path) -> None:
    recipe = tiny_models.recipe_for(None, HALF)
    tiny_models.run_recipe(recipe, llama, tmp_path / "one")
    tiny_models.run_recipe(recipe, sharded, tmp_path / "many")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert not (tmp_path / "many" / INDEX).exists()


def test_large_results_stay_sharded_and_load(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.engine.output.ONE_FILE", 1000)
    report = tiny_models.run_recipe(tiny_models.recipe_for(None, HALF), llama, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-00003.safetensors"))) == 3
    ids = tiny_models.random_ids(2)
    expected = tiny_models.streamed_logits(tmp_path / "out", ids)
    torch.testing.assert_close(tiny_models.stock_logits(tmp_path / "out", ids), expected, rtol=1e-5, atol=1e-5)
    shards = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert shards == report.size.output_bytes


def test_an_index_that_names_a_file_outside_the_folder(sharded: Path) -> None:
    shutil.copy(next(sharded.glob("model-*.safetensors")), sharded.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(sharded.parent / "outside.safetensors"), ".."):
        reindex(sharded, lambda weights, name=name: weights.update({next(iter(weights)): name}))
        refused(sharded, name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{" * 99999])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "missing")


def test_an_index_that_is_wrong_about_a_tensor(sharded: Path) -> None:
    def move(weights: dict[str, str]) -> None:
        first = next(iter(weights))
        weights[first] = next(name for name in weights.values() if name != weights[first])

    reindex(sharded, move)
    refused(sharded, "does not hold it")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, two = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(one)
    save_file({**load_file(two), **dict([tensors.popitem()])}, two)
    refused(sharded, one.name, two.name)


def test_a_single_file_wins_over_an_index_as_in_transformers(llama: Path, sharded: Path) -> None:
    shutil.copy(llama / "model.safetensors", sharded)
    assert [file.name for file in open_checkpoint(sharded).files] == ["model.safetensors"]


def test_a_missing_tensor(folder: Path) -> None:
    tiny_models.retensor(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "model.layers.1.mlp.up_proj.weight", "lacks")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_wrong_shape(folder: Path, name: str) -> None:
    tiny_models.retensor(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refused(folder, name, "shape")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_a_wrong_dtype(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tiny_models.retensor(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, name, str(dtype).removeprefix("torch."))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


@pytest.mark.parametrize(
    "content", ["", "[]", "nonsense", '{"model_type": "llama"', "\xff", '{"a": ' + "9" * 9999 + "}"]
)
def test_a_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "manifest",
    [None, {}, {"modules": 3}, {"modules": {"a": {}}}, {"modules": {"a": {"format": "new", "shape": [1, 1]}}}],
)
def test_a_manifest_that_is_none(folder: Path, manifest: Any) -> None:
    changes = {"model_type": "compressor", "base_model_type": "llama", "quantization_config": manifest}
    reconfigure(folder, **changes)
    refused(folder, "manifest")


def test_packed_tensors_that_do_not_fit_the_manifest(llama: Path, tmp_path: Path) -> None:
    tiny_models.run_recipe(tiny_models.recipe_for(None, HALF), llama, tmp_path / "out")
    tiny_models.retensor(tmp_path / "out", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_values"))
    refused(tmp_path / "out", "model.layers.0.mlp.up_proj.weight_values")


def to_pickle(folder: Path, **how: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **how)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_give_the_same_bytes(llama: Path, folder: Path, tmp_path: Path, zipped: bool) -> None:
    to_pickle(folder, _use_new_zipfile_serialization=zipped)
    recipe = tiny_models.recipe_for(None, HALF)
    tiny_models.run_recipe(recipe, folder, tmp_path / "out")
    tiny_models.run_recipe(recipe, llama, tmp_path / "expected")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_never_run(folder: Path, tmp_path: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    content = {"a": torch.zeros(1), "b": Malicious(tmp_path / "witness")}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, "pytorch_model.bin", "never unpickles code")
    assert not (tmp_path / "witness").exists()


def test_unknown_tensors_are_carried_over_and_reported(folder: Path, tmp_path: Path) -> None:
    extra = {
        "model.mtp.layers.0.proj.weight": torch.randn(5, 3),
        "model.mtp.ids": torch.arange(4),
        "model.layers.2.mlp.up_proj.weight": torch.randn(2, 2),  # a block more than the config knows
    }
    tiny_models.retensor(folder, lambda tensors: tensors.update(extra))
    for save in ("packed", "dense"):
        output = tmp_path / save
        report = tiny_models.run_recipe(tiny_models.recipe_for(None, HALF, save=save), folder, output)
        stored = load_file(output / "model.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in extra.items())
        assert report.carried_over == sorted(extra)
        assert any("3 tensors" in line for line in report.warnings)
        assert sum(row.bytes for row in report.size.ledger if row.group == "carried over") == 108
    tiny_models.stock_logits(tmp_path / "packed", tiny_models.random_ids(1))


def test_a_second_copy_of_a_tied_head_is_dropped_when_equal_and_refused_when_not(folder: Path, tmp_path: Path) -> None:
    tiny_models.retensor(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    report = tiny_models.run_recipe(tiny_models.recipe_for(None, HALF), folder, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert report.carried_over == [] and report.model.tied_embeddings
    tiny_models.retensor(folder, lambda tensors: tensors["lm_head.weight"].add_(1.0))
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_the_digest_knows_every_bit(folder: Path) -> None:
    def digest() -> str:
        return str(list(open_checkpoint(folder).digest())[-1][2])

    before = digest()
    assert digest() == before
    tiny_models.retensor(folder, lambda tensors: tensors["model.norm.weight"].view(torch.int32)[3].add_(1))
    after = digest()
    assert after != before
    reconfigure(folder, rms_norm_eps=1e-4)
    assert digest() != after


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    import transformers

    options = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**options)).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "encoder-decoder")


def test_foreign_quantized_checkpoints_are_refused(folder: Path) -> None:
    """By the name that they give themselves; MLX gives none, and is known by another key."""
    reconfigure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "(gptq)", "give the folder or model it was made from")
    reconfigure(folder, quantization_config={"bits": 4, "mode": "affine"})
    refused(folder, "(?)")
    reconfigure(folder, quantization={"bits": 4, "mode": "affine"})
    refused(folder, "(mlx)")
    reconfigure(folder, quantization_config=[])
    refused(folder)


def test_remote_code_is_not_run_unless_allowed(folder: Path, tmp_path: Path) -> None:
    (folder / "remote.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\n")
    reconfigure(folder, model_type="novel", auto_map={"AutoConfig": "remote.C", "AutoModelForCausalLM": "remote.M"})
    refused(folder, "--trust-remote-code")
    assert not (tmp_path / "witness").exists()


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "holds gguf (model-Q4_0.gguf)", "give the folder or model it was made from")


def test_a_report_names_its_source_by_what_is_in_it(folder: Path, tmp_path: Path) -> None:
    report = tiny_models.run_recipe(tiny_models.recipe_for(None, HALF), folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert report.model.sha256 == total.hexdigest()
