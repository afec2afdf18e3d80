"""A packed low-rank layer multiplies by its factors one after the other, and never by their product."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_folders import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.formats import GroupInt, LowRank, pack, tensor_name
from compressor.formats.dense import Dense
from compressor.formats.group_int import portable_scale
from compressor.hf.linear import PackedLinear, replacement
from compressor.hf.reader import packed_config, reader_source

ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative to the largest output


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factor(m: int, n: int, bits: int, seed: int) -> Dense | GroupInt:
    if bits == 16:
        return Dense(normal(m, n, seed=seed).half())
    codes = torch.randint(-8, 8, (m, n), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    return GroupInt(codes, portable_scale(0.2 * normal(m, 1, seed=seed), bits), None, bits)


def low_rank(m: int, r: int, n: int, bits: int = 16, seed: int = 0) -> LowRank:
    return LowRank(factor(m, r, bits, seed), factor(r, n, bits, seed + 1))


def filled(layer: nn.Module, parts: dict[str, Tensor]) -> PackedLinear:
    assert isinstance(layer, PackedLinear)
    for part, tensor in parts.items():
        layer.register_buffer(f"weight_{part}", tensor)
    if layer.bias is not None:
        layer.bias.data = normal(len(layer.bias), seed=9).to(layer.compute_dtype)
    return layer


def packed(value: LowRank, dtype: torch.dtype, bias: bool = True) -> PackedLinear:
    spec, parts = pack(value, dtype)
    return filled(PackedLinear(spec, bias=bias, dtype=dtype), parts)


def reference(value: LowRank, x: Tensor, bias: Tensor | None) -> Tensor:
    """The output by the multiplied matrix, in fp64."""
    weight = value.left.dense(torch.float64) @ value.right.dense(torch.float64)
    return F.linear(x.double(), weight, None if bias is None else bias.double())


@pytest.fixture
def unmultiplied(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make every product of two factors an error from the call on."""

    def multiplied(*_: Any) -> Tensor:
        raise AssertionError("the factors were multiplied")

    return lambda: monkeypatch.setattr(LowRank, "dense", multiplied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_the_product(dtype: torch.dtype, bits: int, bias: bool, unmultiplied: Any) -> None:
    value = low_rank(12, 3, 20, bits)
    layer = packed(value, dtype, bias)
    assert torch.equal(layer.weight, value.dense(dtype))
    unmultiplied()
    for shape in ((20,), (5, 20), (2, 3, 20), (0, 20)):
        x = normal(*shape, seed=4).to(dtype)
        wanted = reference(value, x, layer.bias).detach()
        found = layer(x).detach()
        assert found.dtype == dtype and found.shape == wanted.shape
        allowed = ROUNDING[dtype] * float(wanted.abs().max()) if wanted.numel() else 0.0
        assert wanted.numel() == 0 or float((found.double() - wanted).abs().max()) <= allowed
    with pytest.raises(AssertionError, match="multiplied"):
        _ = layer.weight


def test_another_dtype_keeps_the_factors_and_computes_in_it(unmultiplied: Any) -> None:
    value = low_rank(12, 3, 20)
    layer = packed(value, torch.bfloat16).float()
    assert {part.dtype for part in layer.parts.values()} == {torch.float16}
    unmultiplied()
    x = normal(4, 20, seed=2)
    torch.testing.assert_close(layer(x), reference(value, x, layer.bias).float(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_part_that_does_not_fit_is_an_error() -> None:
    layer = packed(low_rank(6, 2, 8), torch.float32)
    layer.weight_left_weight = torch.zeros(6, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match="part 'weight' is"):
        layer(torch.zeros(1, 8))


def test_gradients_reach_the_input_the_bias_and_an_adapter(unmultiplied: Any) -> None:
    value = low_rank(6, 2, 8)
    layer = packed(value, torch.float32)
    model = get_peft_model(nn.ModuleDict({"inner": layer}), LoraConfig(r=2, target_modules=["inner"]))
    unmultiplied()
    adapted = model.base_model.model["inner"]
    x = normal(3, 8, seed=1).requires_grad_()
    adapted(x).sum().backward()
    product = value.left.dense(torch.float32) @ value.right.dense(torch.float32)
    torch.testing.assert_close(x.grad, product.sum(0).expand(3, 8), rtol=1e-4, atol=1e-4)
    assert adapted.lora_B["default"].weight.grad.abs().max() > 0
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 3.0))


def test_it_replaces_a_conv1d() -> None:
    value = low_rank(6, 2, 8)
    spec, parts = pack(value, torch.float32)
    conv = Conv1D(6, 8)
    conv.weight.data = value.dense().T.contiguous()
    layer = filled(replacement(conv, spec), parts)
    conv.bias.data = layer.bias.data
    x = normal(2, 5, 8, seed=1)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def write_folder(family: str, folder: Path, ids: Tensor) -> Tensor:
    """Write a model whose linears are all low-rank, fp16 and 4 bits by turns; return its logits by dense weights."""
    folder.mkdir()
    model = tiny_model(family)
    source, tied = json.loads(model.config.to_json_string()), model.config.tie_word_embeddings
    tensors = {name: t.clone() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name == "lm_head":
            continue
        m, n = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        value = low_rank(m, 4, n, (16, 4)[len(modules) % 2], seed=len(modules))
        modules[name], parts = pack(value, torch.float32)
        tensors |= {tensor_name(name, part): tensor for part, tensor in parts.items()}
        module.weight.data = (value.dense().T if isinstance(module, Conv1D) else value.dense()).contiguous()
        del tensors[f"{name}.weight"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(packed_config(source, modules)))
    (folder / "modeling_compressor.py").write_text(reader_source())
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


READER = """
import sys
sys.modules["compressor"] = None
import torch
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[1] + "/expected.pt")
for family in ("llama", "gpt2"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/" + family, trust_remote_code=True)
    reader = sys.modules[type(model).__module__]
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    reader.LowRank.dense = None  # a forward that multiplied the factors would call it
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected[family], rtol=1e-3, atol=1e-3)
"""


def test_folders_are_read_by_the_package_and_by_the_reader(tmp_path: Path, unmultiplied: Any) -> None:
    ids = torch.arange(3, 40)[None]
    logits = {family: write_folder(family, tmp_path / family, ids) for family in ("llama", "gpt2")}
    torch.save({"ids": ids, **logits}, tmp_path / "expected.pt")
    unmultiplied()
    for family, wanted in logits.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == (14 if family == "llama" else 8)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
