"""Exports in integers: what is written, held to slow readers of each layout; and what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import tiny_models
import torch
from integer_models import rounded
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.errors import UserError
from compressor.report.contents import read_contents
from compressor.run.export_compressed_tensors import export_compressed_tensors
from compressor.run.export_gptq import export_gptq
from compressor.run.export_mlx import export_mlx
from compressor.run.mlx_config import ignored_window, older_names

EXPORTS: dict[str, Callable[[str, Path], Any]] = {
    "compressed-tensors": export_compressed_tensors,
    "mlx": export_mlx,
    "gptq": export_gptq,
}


def opened(folder: Path) -> Skeleton:
    return build_skeleton(open_checkpoint(folder))


def slow_fields(words: Tensor, bits: int, count: int) -> list[int]:
    """The first ``count`` numbers of a stream of ``bits`` bits each, lowest first, from 32-bit words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(count)]


def slow_gptq(tensors: dict[str, Tensor], module: str, config: dict[str, Any]) -> Tensor:
    """The matrix (m, n) in fp32, number by number, as the layout is defined."""
    bits, one = config["bits"], config["checkpoint_format"] == "gptq"
    words, zeros = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
    scales, group = tensors[f"{module}.scales"].float(), tensors[f"{module}.g_idx"]
    n, m = len(group), words.shape[1]
    points = torch.tensor([slow_fields(row, bits, m) for row in zeros]) + one
    codes = torch.tensor([slow_fields(words[:, column], bits, n) for column in range(m)])
    return (codes - points[group].T).float() * scales[group].T


def slow_mlx(tensors: dict[str, Tensor], module: str, bits: int, group: int) -> Tensor:
    """The matrix (m, n) in fp64, number by number, as the layout is defined."""
    words = tensors[f"{module}.weight"].view(torch.int32)
    n = words.shape[1] * 32 // bits
    codes = torch.tensor([slow_fields(row, bits, n) for row in words]).double()
    scale, bias = (tensors[f"{module}.{part}"].double().repeat_interleave(group, 1) for part in ("scales", "biases"))
    return codes * scale + bias


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gptq(bits: int, asymmetric: bool, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source", dtype=torch.float16)
    settings = {"bits": bits, "group": "row" if bits == 8 else 32, "asymmetric": asymmetric}
    packed = repacked.repack(source, tmp_path / "packed", lambda _, weight: rounded(weight, **settings))
    done = export_gptq(str(packed), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    found = config["quantization_config"]
    assert (found["bits"], found["group_size"], found["sym"]) == (bits, -1 if bits == 8 else 32, not asymmetric)
    tensors, ours = load_file(tmp_path / "out" / "model.safetensors"), opened(packed)
    assert done.matrices == len(ours.packed) == 14 and done.exact
    for module in list(ours.packed)[:7]:
        assert torch.equal(slow_gptq(tensors, module, found).half(), ours.read(f"{module}.weight")), module
    assert torch.equal(tensors["model.embed_tokens.weight"], ours.read("model.embed_tokens.weight"))
    assert done.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_gptq_where_some_rows_are_one_group(tmp_path: Path) -> None:
    """Groups of 64 in matrices of 64 and of 128 inputs are one grid, and not whole rows here and groups there."""
    source = integer_models.source(tmp_path / "source", dtype=torch.float16)
    packed = repacked.repack(source, tmp_path / "packed", lambda _, weight: rounded(weight, bits=4, group=64))
    export_gptq(str(packed), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["group_size"] == 64
    tensors, ours = load_file(tmp_path / "out" / "model.safetensors"), opened(packed)
    for module in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"):
        assert torch.equal(slow_gptq(tensors, module, found).half(), ours.read(f"{module}.weight")), module


def test_gptq_of_one_plane_of_trits(tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source", dtype=torch.bfloat16)
    packed = repacked.repack(source, tmp_path / "packed", lambda _, weight: integer_models.trits(weight, 32))
    export_gptq(str(packed), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    tensors, ours = load_file(tmp_path / "out" / "model.safetensors"), opened(packed)
    for module in list(ours.packed)[:7]:
        assert torch.equal(slow_gptq(tensors, module, config).bfloat16(), ours.read(f"{module}.weight")), module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlx(dtype: torch.dtype, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source", dtype=dtype)
    packed = repacked.repack(source, tmp_path / "packed", integer_models.mixed)
    done = export_mlx(str(packed), tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization"] == config["quantization_config"]
    assert config["rope_theta"] == 10000.0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx"}
    tensors, ours = load_file(tmp_path / "out" / "model.safetensors"), opened(packed)
    assert done.matrices == 10 and done.exact is (dtype == torch.float32)
    for module in ours.packed:
        place = {**config["quantization"], **config["quantization"].get(module, {})}
        want = ours.read(f"{module}.weight")
        if f"{module}.scales" not in tensors:
            assert "gate_proj" in module and torch.equal(tensors[f"{module}.weight"], want)
            continue
        value = slow_mlx(tensors, module, place["bits"], place["group_size"])
        if dtype == torch.float32 or "up_proj" not in module:  # whose biases bf16 does not have
            assert torch.equal(value.to(dtype), want), module
        else:
            step = tensors[f"{module}.scales"].float().abs().max()
            assert 0 < (value.float() - want.float()).abs().max() < 0.1 * step
    contents, before = read_contents(tmp_path / "out"), read_contents(source)
    assert contents.storage.method == "mlx" and contents.parameters == before.parameters
    shapes = {item.name: item.shape for item in before.items}
    assert all(shapes[item.name.removesuffix(".weight") + ".weight"] == item.shape for item in contents.items)
    assert contents.container_bytes < 10_000
    notes = "; ".join(done.notes)
    assert "2 pruned matrices are stored dense" in notes and ("are rounded to bfloat16" in notes) is not done.exact
    assert ("no 7 bits" in notes) is (dtype == torch.bfloat16)


def test_mlx_keeps_integers_of_embeddings(calibration: Path, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    stage = {"quantize": {"method": "rtn", "bits": 4, "group": 64, "embeddings": 8}}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), source, tmp_path / "packed")
    assert export_mlx(str(tmp_path / "packed"), tmp_path / "out", verify=False).matrices == 15
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    place = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["model.embed_tokens"]
    want = opened(tmp_path / "packed").read("model.embed_tokens.weight").double()
    assert torch.equal(slow_mlx(tensors, "model.embed_tokens", place["bits"], place["group_size"]), want)


def test_names_that_mlx_lm_looks_for() -> None:
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert older_names(scaled) == {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    layers = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    assert older_names(layers) == {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert ignored_window({"model_type": "mistral", "sliding_window": 8}) == 8
    assert ignored_window({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}) is None


@pytest.mark.parametrize("form", EXPORTS)
def test_what_is_no_integer_is_refused_by_name(form: str, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    planes = repacked.repack(source, tmp_path / "planes", lambda _, weight: integer_models.trits(weight, 64, planes=2))
    others = repacked.repack(source, tmp_path / "others", repacked.everything)
    before = sorted(tmp_path.iterdir())
    for folder, words in ((planes, "several planes of trits"), (others, "a product of two matrices")):
        with pytest.raises(UserError, match=rf"layers\.0\.\S+ and \d+ more .*{words}") as caught:
            EXPORTS[form](str(folder), tmp_path / "out")
        assert "--format dense" in str(caught.value)
    with pytest.raises(UserError, match=r"nothing in .* is packed"):
        EXPORTS[form](str(source), tmp_path / "out")
    pruned = repacked.repack(source, tmp_path / "pruned", lambda _, weight: repacked.Masked(weight, weight > 0))
    with pytest.raises(UserError, match="no matrix of this folder is made of integers"):
        EXPORTS[form](str(pruned), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    good = repacked.repack(source, tmp_path / "good", lambda _, w: rounded(w, bits=4, group=32, asymmetric=True))
    with pytest.raises(UserError, match="exists already"):
        EXPORTS[form](str(good), tmp_path / "taken")
    assert sorted(tmp_path.iterdir()) == sorted([*before, pruned, good, tmp_path / "taken"])


def test_refusals_of_single_forms(tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    alike = repacked.repack(source, tmp_path / "alike", lambda _, weight: rounded(weight, bits=4, group=16))
    with pytest.raises(UserError, match="is a folder of compressed-tensors already"):
        export_compressed_tensors(str(alike), tmp_path / "out")
    with pytest.raises(UserError, match="groups of 16 inputs, and MLX has 32, 64 and 128"):
        export_mlx(str(alike), tmp_path / "out")
    wide = repacked.repack(source, tmp_path / "wide", lambda _, w: rounded(w, bits=8, group=32, asymmetric=True))
    with pytest.raises(UserError, match="zero points beside codes of 8 bits"):
        export_compressed_tensors(str(wide), tmp_path / "out")
    half = integer_models.source(tmp_path / "half", dtype=torch.bfloat16)
    sparse = repacked.repack(half, tmp_path / "sparse", lambda _, weight: integer_models.sparse(weight))
    with pytest.raises(UserError, match="scales in float16 that bfloat16 does not have"):
        export_compressed_tensors(str(sparse), tmp_path / "out")
    mixed = repacked.repack(
        source, tmp_path / "mixed", lambda name, w: rounded(w, bits=8 if "q_" in name else 4, group=32)
    )
    with pytest.raises(UserError, match=r"has 4 bits in groups of 32, symmetric; \S+q_proj has 8 bits"):
        export_gptq(str(mixed), tmp_path / "out")
    some = repacked.repack(source, tmp_path / "some", lambda n, w: None if "q_" in n else rounded(w, bits=4, group=32))
    with pytest.raises(UserError, match=r"0\.self_attn\.q_proj and 1 more are not"):
        export_gptq(str(some), tmp_path / "out")
    experts = tiny_models.save(tiny_models.random_model("qwen3_moe"), tmp_path / "experts")
    packed = repacked.repack(experts, tmp_path / "packed", lambda _, w: rounded(w, bits=4, group=16))
    with pytest.raises(UserError, match="mixture of experts"):
        export_gptq(str(packed), tmp_path / "out")
    with pytest.raises(UserError, match="knows no qwen3_moe"):
        export_mlx(str(packed), tmp_path / "out")
    gpt2 = tiny_models.save(tiny_models.random_model("gpt2"), tmp_path / "gpt2")
    turned = repacked.repack(gpt2, tmp_path / "turned", lambda _, w: rounded(w, bits=4, group=16))
    with pytest.raises(UserError, match="stored transposed"):
        export_compressed_tensors(str(turned), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
