"""explain: a plain folder, ours, other quantizers', and what it says to mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from compressor.cli.explain import explain, folded
from compressor.errors import UserError
from compressor.formats import tensor_name
from compressor.formats.bitmask import pack_bitmask
from compressor.formats.nm import pack_nm
from compressor.methods.quantize_settings import PbLlmSettings
from compressor.methods.quantizers import quantize
from compressor.methods.statistics import InputStatistics
from compressor.report.contents import read_contents

BLOCKS, WIDTH, INNER, VOCABULARY = 3, 16, 24, 32


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "tiny"
    with torch.random.fork_rng():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def packed(llama: Path) -> Path:
    """The same model with its q_proj as bitmask and its up_proj as 2:4, packed by hand."""
    tensors: dict[str, Tensor] = load_file(llama / "model.safetensors")
    modules: dict[str, dict[str, Any]] = {}
    for block in range(BLOCKS):
        for part, form in (("self_attn.q_proj", "bitmask"), ("mlp.up_proj", "nm")):
            module = f"model.layers.{block}.{part}"
            weight = tensors.pop(f"{module}.weight")
            mask = torch.zeros(weight.shape, dtype=torch.bool)
            mask[:, ::2] = True
            if form == "bitmask":
                mask[0, : block + 1] = False  # so that the sparsities of the blocks differ
            spec: dict[str, Any] = {"format": form, "shape": list(weight.shape), "dtype": "bfloat16"}
            spec |= {"nnz": int(mask.sum())} if form == "bitmask" else {"n": 2, "m": 4}
            parts = pack_bitmask(weight, mask) if form == "bitmask" else pack_nm(weight, mask, 2, 4)
            tensors |= {tensor_name(module, name): tensor for name, tensor in parts.items()}
            modules[module] = spec
    save_file(tensors, llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    config |= {
        "model_type": "compressor",
        "base_model_type": "llama",
        "auto_map": {"AutoModelForCausalLM": "reader.Model"},
        "quantization_config": {"format_version": 1, "modules": modules},
    }
    (llama / "config.json").write_text(json.dumps(config))
    return llama


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(explain)
    return CliRunner().invoke(app, list(arguments))


def test_plain_folder(llama: Path) -> None:
    contents = read_contents(llama)
    sizes = {row.group: (row.tensors, row.parameters, row.bytes) for row in contents.ledger()}
    linear = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER
    assert sizes["kept linears"] == (7 * BLOCKS, BLOCKS * linear, 2 * BLOCKS * linear)
    assert sizes["embeddings"] == (1, VOCABULARY * WIDTH, 2 * VOCABULARY * WIDTH)
    assert sizes["norms and others"] == (2 * BLOCKS + 1, WIDTH * (2 * BLOCKS + 1), 2 * WIDTH * (2 * BLOCKS + 1))
    files = sum(file.stat().st_size for file in llama.iterdir())
    assert sum(row.bytes for row in contents.ledger()) == contents.disk_bytes == files
    assert sum(row.share for row in contents.ledger()) == pytest.approx(1)
    assert contents.bits() == 16
    assert contents.storage.method == "plain"
    assert all(item.sparsity is None for item in contents.items)


def test_scan_counts_zeros(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.ones_like(tensors[name])
    tensors[name][:, :6] = 0
    tensors[name][:, 6] = -0.0
    save_file(tensors, llama / "model.safetensors")
    found = {item.name: item.sparsity for item in read_contents(llama, scan=True).items}
    assert found[name] == pytest.approx(7 / INNER)
    assert found["model.norm.weight"] is None


def test_packed_folder(packed: Path) -> None:
    contents = read_contents(packed)
    items = {item.name: item for item in contents.items}
    q = items["model.layers.2.self_attn.q_proj"]
    nnz = WIDTH * WIDTH // 2 - 2
    assert q.format == "bitmask"
    assert q.shape == (WIDTH, WIDTH)
    assert q.sparsity == pytest.approx(1 - nnz / WIDTH**2)
    assert q.bytes == WIDTH * WIDTH // 8 + 2 * nnz
    up = items["model.layers.0.mlp.up_proj"]
    assert up.format == "nm 2:4"
    assert up.sparsity == 0.5
    rows = {(row.group, row.format): row for row in contents.ledger()}
    assert rows["compressed linears", "bitmask"].parameters == BLOCKS * WIDTH * WIDTH
    assert rows["compressed linears", "nm 2:4"].parameters == BLOCKS * WIDTH * INNER
    assert rows["kept linears", "bfloat16"].tensors == 5 * BLOCKS
    before = 2 * BLOCKS * (WIDTH * WIDTH + WIDTH * INNER)
    assert sum(row.bytes for row in contents.ledger() if row.group == "compressed linears") < 0.7 * before
    assert sum(row.bytes for row in contents.ledger()) == contents.disk_bytes


def test_signs_are_no_zeros(llama: Path) -> None:
    """Partial binarization counts its salient weights; all others are a sign and a scale, none of them zero."""
    tensors: dict[str, Tensor] = load_file(llama / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    weight = tensors.pop(f"{module}.weight").float()
    code = quantize("pb-llm", weight, InputStatistics(torch.eye(WIDTH), tokens=WIDTH), PbLlmSettings()).code
    spec = code.spec(torch.bfloat16)
    assert 0 < spec["nnz"] < weight.numel()
    tensors |= {tensor_name(module, name): tensor for name, tensor in code.parts().items()}
    save_file(tensors, llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "compressor", "quantization_config": {"format_version": 1, "modules": {module: spec}}}
    (llama / "config.json").write_text(json.dumps(config))
    items = {item.name: item for item in read_contents(llama).items}
    assert items[module].format == f"partial-binary, {spec['bits']} bits" and items[module].sparsity is None


def test_what_can_load_a_packed_folder(packed: Path) -> None:
    storage = read_contents(packed).storage
    assert any("import compressor" in sentence for sentence in storage.loads)
    assert any("reader.py is missing" in sentence for sentence in storage.refuses)
    (packed / "reader.py").write_text("")
    storage = read_contents(packed).storage
    assert any("trust_remote_code=True, through reader.py" in sentence for sentence in storage.loads)
    assert any("vLLM" in sentence for sentence in storage.refuses)


def test_folding_keeps_the_range(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # narrower tables break names
    lines = dict(folded(read_contents(packed).items))
    members = lines["model.layers.{0..2}.self_attn.q_proj"]
    assert len(members) == BLOCKS
    shown = command(str(packed)).output
    assert "model.layers.{0..2}.self_attn.q_proj" in shown
    assert "50.4" in shown.replace("\u00a0", " ")
    assert "model.layers.1.mlp.up_proj" not in shown
    assert "model.layers.1.mlp.up_proj" in command(str(packed), "--all").output


def test_json(packed: Path) -> None:
    content = json.loads(command(str(packed), "--json").output)
    assert content["storage"] == "compressor"
    assert content["base_model_type"] == "llama"
    names = [tensor["name"] for tensor in content["tensors"]]
    assert len(names) == len(set(names)) == 7 * BLOCKS + 2 * BLOCKS + 2
    assert content["disk_bytes"] == sum(row["bytes"] for row in content["ledger"])


def write_folder(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": 32, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


INT = torch.int32
FOREIGN = {
    "gptq": (
        {"qweight": torch.zeros(8, 16, dtype=INT), "scales": torch.zeros(1, 16), "g_idx": torch.zeros(64, dtype=INT)},
        {"quant_method": "gptq", "bits": 4},
    ),
    "awq": (
        {
            "qweight": torch.zeros(64, 2, dtype=INT),
            "qzeros": torch.zeros(1, 2, dtype=INT),
            "scales": torch.zeros(1, 16),
        },
        {"quant_method": "awq", "bits": 4},
    ),
    "compressed-tensors": (
        {
            "weight_packed": torch.zeros(16, 8, dtype=INT),
            "weight_scale": torch.zeros(16, 1),
            "weight_shape": torch.tensor([16, 64]),
        },
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    ),
    "fp8": (
        {"weight": torch.zeros(16, 64, dtype=torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1)},
        {"quant_method": "fp8"},
    ),
}


@pytest.mark.parametrize("method", FOREIGN)
def test_other_quantizers_are_named_and_counted(tmp_path: Path, method: str) -> None:
    parts, quantization = FOREIGN[method]
    tensors = {f"model.layers.0.mlp.up_proj.{part}": tensor for part, tensor in parts.items()}
    tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(64)
    contents = read_contents(write_folder(tmp_path / "q", tensors, quantization))
    item = next(item for item in contents.items if item.name == "model.layers.0.mlp.up_proj")
    assert item.shape == (16, 64)
    assert item.group == "compressed linears"
    assert item.format.startswith(method)
    assert item.bytes == sum(tensor.nbytes for tensor in parts.values())
    assert contents.storage.loads


def test_bitsandbytes(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: torch.zeros(512, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(16)}
    contents = read_contents(
        write_folder(tmp_path / "q", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    )
    assert [(item.name, item.parameters) for item in contents.items] == [("model.layers.0.mlp.up_proj", 1024)]


def test_unknown_quantizers_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "q", {"a.weight": torch.zeros(4)}, {"quant_method": "novel"})
    storage = read_contents(folder).storage
    assert storage.method == "novel"
    assert storage.loads == ()
    assert "novel" in storage.refuses[0]


def test_mistakes(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        read_contents(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        read_contents(packed / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        read_contents(tmp_path / "empty")
    config = json.loads((packed / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.0.gone"] = {"format": "bitmask", "shape": [2, 2], "dtype": "bfloat16", "nnz": 1}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lists 'model\.layers\.0\.gone'"):
        read_contents(packed)
    modules.pop("model.layers.0.gone")
    modules["model.layers.0.self_attn.q_proj"] = {"format": "bitmask"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unreadable entry"):
        read_contents(packed)


def test_names_do_not_steer_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a\x1b[2J[bold]b": torch.zeros(2, 2)}, folder / "model.safetensors")
    output = command(str(folder)).output
    assert "\x1b" not in output
    assert "a\\x1b[2J[bold]b" in output


def test_the_ledger_knows_the_source(llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(llama, plain)
    before = read_contents(plain)
    packed: Path = request.getfixturevalue("packed")
    rows = read_contents(packed).ledger(before)
    assert sum(row.source_bytes or 0 for row in rows) == before.disk_bytes
    bitmask = next(row for row in rows if row.format == "bitmask")
    assert bitmask.source_bytes == 2 * BLOCKS * WIDTH * WIDTH


def test_a_tied_embedding_may_be_stored_under_either_name(tmp_path: Path) -> None:
    head = write_folder(tmp_path / "h", {"lm_head.weight": torch.zeros(32, 4)}, {})
    embedding = write_folder(tmp_path / "e", {"model.embed_tokens.weight": torch.zeros(32, 4)}, {})
    rows = {row.group: row for row in read_contents(embedding).ledger(read_contents(head))}
    assert rows["embeddings"].source_bytes == 4 * 32 * 4


def test_what_linearizing_adds_is_a_group_of_its_own(tmp_path: Path) -> None:
    """New tensors, of which the source had none; the attention's own projections stay what they are."""
    attention = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    new = {
        "model.layers.0.self_attn.lin_k.weight": torch.zeros(2, 4, 4),
        "model.layers.0.self_attn.lin_mix": torch.zeros(4),
    }
    before = read_contents(write_folder(tmp_path / "s", attention, {}))
    after = write_folder(tmp_path / "l", {**attention, **new}, {})
    config = json.loads((after / "config.json").read_text())
    (after / "config.json").write_text(json.dumps({**config, "linear_attention": {"layers": [0]}}))
    rows = {row.group: row for row in read_contents(after).ledger(before)}
    memory = rows["attention memory"]
    assert (memory.tensors, memory.bytes, memory.source_bytes) == (2, 4 * 36, 0)
    assert (rows["kept linears"].bytes, rows["kept linears"].source_bytes) == (64, 64)


def test_a_source_that_lacks_the_prefix_or_the_tensor(tmp_path: Path) -> None:
    short = write_folder(tmp_path / "s", {"h.0.a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(2)}, {})
    long = {"transformer.h.0.a.weight": torch.zeros(4, 4), "transformer.other.weight": torch.zeros(2)}
    rows = {
        row.group: row for row in read_contents(write_folder(tmp_path / "l", long, {})).ledger(read_contents(short))
    }
    assert rows["kept linears"].source_bytes == 64
    assert rows["norms and others"].source_bytes is None


def test_carried_over_tensors_are_a_group_of_their_own(llama: Path) -> None:
    rows = {row.group: row for row in read_contents(llama, carried_over=["model.norm.weight"]).ledger()}
    assert rows["carried over"].parameters == WIDTH
