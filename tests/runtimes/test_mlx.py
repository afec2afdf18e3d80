"""Exports for MLX in MLX itself, on the CPU; whole models where mlx-lm is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import tiny_models
import torch
from foreign import need_package
from torch import Tensor

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.run.export_mlx import export_mlx

ROPE = {"rope_theta": 777.0, "rope_type": "default", "partial_rotary_factor": 1.0}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"]


def back(array: Any) -> Tensor:
    """An array of MLX as fp32."""
    import mlx.core as mx
    import numpy as np

    return torch.from_numpy(np.array(array.astype(mx.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mlx_reads_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    """In fp32 to the bit; in half precision MLX rounds twice for every weight."""
    need_package("mlx")
    import mlx.core as mx

    source = integer_models.source(tmp_path / "source", dtype=dtype)
    packed = repacked.repack(source, tmp_path / "packed", integer_models.mixed)
    export_mlx(str(packed), tmp_path / "out", verify=False)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    arrays, ours = mx.load(str(tmp_path / "out" / "model.safetensors")), build_skeleton(open_checkpoint(packed))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    for module in (module for module in ours.packed if f"{module}.scales" in arrays):
        place = {**quantization, **quantization.get(module, {})}
        how = {"group_size": place["group_size"], "bits": place["bits"]}
        parts = [arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        found, want = back(mx.dequantize(*parts, **how)), ours.read(f"{module}.weight").float()
        if dtype == torch.float32:
            assert torch.equal(found, want), module
        assert (found - want).abs().max() <= (0.0 if dtype == torch.float32 else 0.02) * want.abs().max(), module
        inputs = x[:, : want.shape[1]]
        given = mx.array(inputs.float().numpy()).astype(parts[1].dtype)
        product = back(mx.quantized_matmul(given, *parts, transpose=True, **how))
        exact = inputs.float() @ want.T
        assert (product - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * exact.abs().max(), module


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_in_mlx_lm(family: str, tmp_path: Path) -> None:
    need_package("mlx")
    need_package("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    more: dict[str, Any] = {"rope_parameters": ROPE} if family != "gemma3" else {}
    if family in ("gemma2", "mistral", "phi3"):  # mlx-lm has no windows there
        more["sliding_window"] = None if family != "gemma2" else 64
    source = integer_models.source(tmp_path / "source", family, **more)
    packed = repacked.repack(source, tmp_path / "packed", lambda _, w: integer_models.rounded(w, bits=4, group=32))
    done = export_mlx(str(packed), tmp_path / "out", verify=False)
    assert done.exact and len(done.notes) == (family == "gemma2")
    model, _ = load_model(tmp_path / "out")
    ids = integer_models.IDS
    found, want = back(model(mx.array(ids.numpy()))), tiny_models.stock_logits(packed, ids)
    assert (found - want).abs().max() < 1e-3 * want.abs().max()
