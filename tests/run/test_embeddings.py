"""Embeddings and heads as integers: what is written, what loads it, who sees the coded ones, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.hf.embedding import TiedHead, is_packed_embedding
from compressor.run import judge, stream

FAMILIES = ["llama", "qwen2", "gemma3", "gpt2", "opt", "neox", "qwen3_moe"]
TIED = {"llama", "gemma3", "gpt2", "opt"}


def recipe(calibration: Path, bits: int = 8, **content: Any) -> Any:
    stage = {"method": "rtn", "bits": 4, "group": 16, "embeddings": bits}
    return tiny_models.recipe_for(calibration, {"quantize": stage}, **content)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> dict[str, tuple[Path, Any]]:
    """Family -> coded folder and report, each verified in a fresh process."""
    made = {}
    for family in FAMILIES:
        place = tmp_path_factory.mktemp(family)
        source = tiny_models.save(tiny_models.random_model(family), place / "source")
        report = tiny_models.run_recipe(recipe(calibration, verify=True), source, place / "out")
        made[family] = (place / "out", report)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_has_the_logits_of_the_run(family: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, report = folders[family]
    assert report.verification is not None and report.verification.passed
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert abs(on_disk - report.size.output_bytes) <= 0.01 * on_disk
    stored = load_file(folder / "model.safetensors")
    packed = [name for name, tensor in stored.items() if tensor.dtype == torch.int32 and ".layers." not in name]
    outer = [name for name in packed if ".h." not in name]
    assert len(outer) == (1 if family in TIED else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_those_of_the_engine(family: str, folders: dict[str, tuple[Path, Any]]) -> None:
    """Lookup, head, moving to another dtype, and what is left when everything is unpacked for good."""
    folder, _ = folders[family]
    ids = tiny_models.random_ids(2)
    wanted = tiny_models.streamed_logits(folder, ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    skeleton = build_skeleton(open_checkpoint(folder))
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    assert is_packed_embedding(embedding) and torch.equal(embedding.weight, skeleton.read(f"{name}.weight"))
    assert isinstance(model.get_output_embeddings(), TiedHead) is (family in TIED)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        if family != "qwen3_moe":
            model.dequantize()
            assert not is_packed_embedding(model.get_input_embeddings())
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert tied is (family in TIED)
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_other_way_of_loading(folders: dict[str, tuple[Path, Any]]) -> None:
    """The reader file has all that is needed: run as the module that travels with the folder."""
    folder, _ = folders["llama"]
    ids = tiny_models.random_ids(1)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_models.streamed_logits(folder, ids), rtol=1e-4, atol=1e-4)
    assert "class TiedHead" in (folder / "modeling_compressor.py").read_text()


def test_saving_a_loaded_model_keeps_it_packed(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = folders["llama"]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_codes_are_near_and_cost_what_they_should(calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "source")
    before = build_skeleton(open_checkpoint(source)).read("model.embed_tokens.weight")
    sizes = {}
    for bits in (8, 4):
        plan = stream.foresee(recipe(calibration, bits), str(source))[1]
        report = tiny_models.run_recipe(recipe(calibration, bits), source, tmp_path / str(bits))
        assert abs(plan.output_bytes - report.size.output_bytes) <= 0.02 * plan.output_bytes
        after = build_skeleton(open_checkpoint(tmp_path / str(bits))).read("model.embed_tokens.weight")
        assert (after - before).norm() < (0.02 if bits == 8 else 0.2) * before.norm()
        sizes[bits] = next(row.bytes for row in report.size.ledger if row.group == "embeddings")
    assert sizes[8] == before.numel() + 4 * len(before) + 16 and sizes[4] == before.numel() // 2 + 4 * len(before) + 16


def test_only_what_is_compressed_sees_the_coded_embedding(calibration: Path, tmp_path: Path) -> None:
    """Perplexity of the dense model is that without coding; the compressed one's is what the folder has."""
    source = tiny_models.save(tiny_models.random_model("llama", tie_word_embeddings=False), tmp_path / "source")
    asked = {"evaluation": {"texts": [str(calibration)], "windows": 2, "seqlen": 16}}
    plain = tiny_models.recipe_for(calibration, {"quantize": {"method": "rtn", "bits": 8, "group": 16}}, **asked)
    first = tiny_models.run_recipe(plain, source, tmp_path / "plain")
    second = tiny_models.run_recipe(recipe(calibration, 4, **asked), source, tmp_path / "coded")
    rows = [report.evaluation[0].rows for report in (first, second)]
    assert rows[0][0].perplexity == rows[1][0].perplexity
    again = judge.judge_model(str(tmp_path / "coded"), texts=[str(calibration)], windows=2, seqlen=16)
    assert again[0]["rows"][0]["perplexity"] == pytest.approx(rows[1][1].perplexity, rel=1e-5)
    assert rows[1][1].perplexity != rows[0][1].perplexity


def test_save_dense_writes_the_rounded_embedding(
    folders: dict[str, tuple[Path, Any]], calibration: Path, tmp_path: Path
) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "source")
    tiny_models.run_recipe(recipe(calibration, save="dense"), source, tmp_path / "dense")
    ids = tiny_models.random_ids(1)
    dense, packed = (tiny_models.streamed_logits(path, ids) for path in (tmp_path / "dense", folders["llama"][0]))
    assert torch.equal(dense, packed)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_embeddings_are_coded_once(calibration: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "source")
    only = {"method": "rtn", "bits": 4, "group": 16, "embeddings": 8, "include": ["layers.0"]}
    rest = {**only, "include": ["layers.1"]}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, {"quantize": only}), source, tmp_path / "first")
    with pytest.raises(UserError, match=r"embed_tokens is already quantized.*--embeddings"):
        tiny_models.run_recipe(
            tiny_models.recipe_for(calibration, {"quantize": rest}), tmp_path / "first", tmp_path / "second"
        )
    rest["embeddings"] = None
    tiny_models.run_recipe(
        tiny_models.recipe_for(calibration, {"quantize": rest}), tmp_path / "first", tmp_path / "second"
    )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert torch.equal(first["model.embed_tokens.weight_packed"], second["model.embed_tokens.weight_packed"])


def test_another_dtype_is_that_of_the_values_not_of_the_parts(folders: dict[str, tuple[Path, Any]]) -> None:
    embedding = AutoModelForCausalLM.from_pretrained(folders["llama"][0]).get_input_embeddings()
    ids = tiny_models.random_ids(1)
    before = embedding(ids)
    assert torch.equal(embedding.to(torch.bfloat16)(ids), before.to(torch.bfloat16))
    assert embedding.weight_scale.dtype == torch.float32 and embedding.weight.dtype == torch.bfloat16
