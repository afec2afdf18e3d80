"""``compressor export --format gguf``: what is said, what is written, what is refused; read by the ``gguf`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repacked
import tiny_models
import torch
from foreign import need_package
from llama_cpp import EMBEDDED
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.formats import GroupInt, Representation, TritPlanes
from compressor.formats.group_int import portable_scale
from compressor.formats.representation import SparseInt
from compressor.report.gguf_contents import gguf_in, read_gguf
from compressor.run import export_gguf as module
from compressor.run.export_gguf import export_gguf
from compressor.run.gguf_types import decode


@pytest.fixture(autouse=True)
def _needs() -> None:
    need_package("gguf")


def save_wide(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A random model whose rows are whole blocks of 256, with the embedded model's tokenizer."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "scale": 0.05}
    model = tiny_models.random_model(family, **{**sizes, **more})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("models") / "wide")


def trits(planes: int, group: int) -> Any:
    """Ternary codes of a matrix: plane after plane of what is left."""

    def code(name: str, weight: Tensor) -> Representation:
        left, found, scales = weight.float(), [], []
        for _ in range(planes):
            blocks = left.reshape(len(left), -1, group)
            scale = blocks.abs().mean(-1).mul(1.2).half()
            plane = (blocks / scale[..., None].float()).round().clamp(-1, 1)
            left = (blocks - plane * scale[..., None].float()).reshape(left.shape)
            found.append(plane.reshape(left.shape).to(torch.int8))
            scales.append(scale)
        return TritPlanes(torch.stack(found), torch.stack(scales), group)

    return code


def integers(bits: int, group: int, zero: bool = False) -> Any:
    def code(name: str, weight: Tensor) -> Representation:
        blocks = weight.float().reshape(len(weight), -1, group)
        high = 2 ** (bits - 1) - 1
        scale = portable_scale(blocks.abs().amax(-1) / high, bits)
        codes = (blocks / scale[..., None]).round().clamp(-high - 1, high).reshape(weight.shape).to(torch.int8)
        return GroupInt(codes, scale, torch.full_like(scale, 5, dtype=torch.int8) if zero else None, bits)

    return code


def sparse(name: str, weight: Tensor) -> Representation:
    scale = (weight.float().abs().amax(1) / 7).half()
    codes = (weight.float() / scale.float()[:, None]).round().clamp(-7, 7) + 7
    zero = torch.full((len(weight),), 7, dtype=torch.uint8)
    return SparseInt(codes.to(torch.uint8), scale, zero, weight.abs() > weight.abs().median(), 4)


def tensors_of(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str], Any]:
    """Values and types by name, and the reader."""
    from gguf import GGUFReader

    (file,) = folder.glob("*.gguf")
    reader = GGUFReader(file)
    values = {t.name: decode(t.tensor_type.name, t.data).reshape(t.shape[::-1]) for t in reader.tensors}
    return values, {t.name: t.tensor_type.name for t in reader.tensors}, reader


@pytest.mark.parametrize(
    ("code", "kind", "exact"),
    [
        (trits(1, 256), "TQ2_0", True),
        (trits(1, 128), "Q4_0", True),
        (integers(4, 32), "Q4_0", True),
        (integers(4, 128), "Q4_0", True),
        (integers(2, 64), "Q4_0", True),
        (integers(8, 32), "Q8_0", True),
        (integers(4, 32, zero=True), "Q8_0", True),
        (sparse, "Q4_0", True),
        (trits(2, 256), "F16", False),
        (integers(4, 16), "F16", True),
        (lambda name, weight: repacked.truncated(weight, 8), "F16", False),
    ],
)
def test_packed_numbers_arrive(code: Any, kind: str, exact: bool, wide: Path, tmp_path: Path) -> None:
    """Integers on blocks arrive as they are; all else is F16, and what that rounds is said."""
    packed = repacked.repack(wide, tmp_path / "packed", code)
    said: list[str] = []
    done = export_gguf(str(packed), tmp_path / "out", say=said.append, verify=False)
    values, kinds, _ = tensors_of(tmp_path / "out")
    skeleton = build_skeleton(open_checkpoint(packed))
    for short, long in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        wanted = skeleton.representation(f"model.layers.1.{long}").dense().float().numpy()
        found = values[f"blk.1.{short}.weight"]
        assert kinds[f"blk.1.{short}.weight"] == kind
        if exact:
            assert np.array_equal(found, wanted)
        else:
            np.testing.assert_allclose(found, wanted, rtol=2**-11, atol=2**-24)
    matrices = next(line for line in said if line.strip().startswith("matrices"))
    assert f"14 x {kind}" in matrices and matrices.endswith("exact") == exact
    assert done.form == f"gguf {kind}" and done.matrices == 14


def test_transformers_reads_the_same_model(wide: Path, tmp_path: Path) -> None:
    """Names, the order of rotated rows and hyper-parameters, in the eyes of another reader."""
    export_gguf(str(wide), tmp_path / "out", kind="F32", verify=False)
    ids = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(0))
    name = "wide-F32.gguf"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, tiny_models.stock_logits(wide, ids), atol=1e-5)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_dense_model_in_every_type(kind: str, wide: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = export_gguf(str(wide), tmp_path / "out", kind=kind, say=said.append, verify=False)
    values, kinds, reader = tensors_of(tmp_path / "out")
    assert kinds["blk.0.attn_q.weight"] == kind and kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {"Q4_0": "Q8_0"}.get(kind, kind) and "output.weight" not in kinds  # tied
    wanted = load_file(wide / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    error = np.sqrt(np.square(values["blk.0.ffn_up.weight"] - wanted).mean() / np.square(wanted).mean())
    assert error <= {"F32": 0, "F16": 3e-4, "BF16": 3e-3, "Q8_0": 0.01, "Q4_0": 0.1}[kind]
    assert done.exact == (kind == "F32") and any("rounded" in line for line in said) == (kind != "F32")
    assert done.tensor_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"wide-{kind}.gguf" in card and "llama-server" in card and ("rounded" in card) == (kind != "F32")
    assert not list(tmp_path.glob("*.partial"))


def test_ternary_types_are_for_ternary_matrices(wide: Path, tmp_path: Path) -> None:
    for number, code in enumerate((trits(2, 256), trits(1, 128), integers(4, 256))):
        packed = repacked.repack(wide, tmp_path / str(number), code)
        with pytest.raises(UserError, match=r"14 matrices are not.*--planes 1 --group 256"):
            export_gguf(str(packed), tmp_path / "out", kind="TQ2_0")
    with pytest.raises(UserError, match=r"--planes 1 --group 256"):
        export_gguf(str(wide), tmp_path / "out", kind="TQ1_0")
    packed = repacked.repack(wide, tmp_path / "ternary", trits(1, 256))
    for kind in ("TQ1_0", "TQ2_0"):
        assert export_gguf(str(packed), tmp_path / kind, kind=kind, verify=False).form == f"gguf {kind}"
    one, other = (tensors_of(tmp_path / kind)[0] for kind in ("TQ1_0", "TQ2_0"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_rows_that_are_no_blocks_stay_f16_and_this_is_said(tmp_path: Path) -> None:
    model = save_wide(tmp_path / "narrow", hidden_size=64, intermediate_size=172, head_dim=16)
    said: list[str] = []
    done = export_gguf(str(model), tmp_path / "out", kind="Q4_0", say=said.append, verify=False)
    assert tensors_of(tmp_path / "out")[1]["blk.0.ffn_down.weight"] == "F16"
    assert any("2 x F16" in line and "rows of 172 are no blocks of 32" in line for line in said)
    assert any("rows of 172" in note for note in done.notes)


def test_a_dry_run_writes_nothing(wide: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = export_gguf(str(wide), tmp_path / "out", dry_run=True, say=said.append)
    assert done.form == "gguf F16" and "wide-F16.gguf (llama)" in said[0] and not list(tmp_path.iterdir())


def test_the_report_and_the_licence_come_along(tmp_path: Path, calibration: Path) -> None:
    source = save_wide(tmp_path / "source")
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    recipe = tiny_models.recipe_for(calibration, {"quantize": {"method": "rtn", "bits": 4, "group": 32}})
    tiny_models.run_recipe(recipe, source, tmp_path / "packed")
    export_gguf(str(tmp_path / "packed"), tmp_path / "out", verify=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    size = next((tmp_path / "out").glob("*.gguf")).stat().st_size
    assert report["exported"]["form"] == "gguf Q4_0" and report["exported"]["file_bytes"] == size
    assert report["exported"]["bits_per_weight_linears"] == 4.5
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    for number, (family, more, word) in enumerate(
        [
            ("gpt2", {}, "its architecture is gpt2"),
            ("mistral", {"sliding_window": 8}, "slides over 8 tokens"),
            ("llama", {"rope_parameters": rope}, "'yarn'"),
            ("llama", {"attention_bias": True}, "is a bias"),
            ("qwen3", {"attention_bias": True}, "is a bias"),
            ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ]
    ):
        model = tiny_models.save(tiny_models.random_model(family, **more), tmp_path / str(number))
        with pytest.raises(UserError, match=word):
            export_gguf(str(model), tmp_path / "out", tokenizer="none")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_values_too_large_for_f16_are_refused(wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    for file in wide.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj.*too large for F16"):
        export_gguf(str(folder), tmp_path / "out")
    export_gguf(str(folder), tmp_path / "out", kind="BF16", verify=False)


@pytest.mark.parametrize("number", [28, None])  # numpy forgets it
def test_a_full_disk_leaves_nothing_and_a_second_run_writes(
    number: int | None, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    write, seen = GGUFWriter.write_tensor_data, []

    def full(self: Any, tensor: Any, *rest: Any) -> None:
        seen.append(tensor)
        if len(seen) == 9:
            raise OSError(number, "No space left on device") if number else OSError("12288 requested and 4096 written")
        write(self, tensor, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GGUFWriter, "write_tensor_data", full)
        with pytest.raises(UserError, match=r"the disk is full; make room and run the same again"):
            export_gguf(str(wide), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert export_gguf(str(wide), tmp_path / "out", verify=False).form == "gguf F16"


def test_a_file_that_reads_otherwise_is_not_published(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Source, "in_order", lambda self, entry: self.matrix(entry.source)[0] + 1)
    with pytest.raises(UserError, match="reads otherwise"):
        export_gguf(str(wide), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_outputs_and_packages_are_looked_at_first(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        export_gguf(str(wide), tmp_path / "there")
    with pytest.raises(UserError, match="is, contains or lies in"):
        export_gguf(str(wide), wide / "inside")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"compressor\[gguf\]"):
        export_gguf(str(wide), tmp_path / "out")


def test_explain_reads_the_file(wide: Path, tmp_path: Path) -> None:
    packed = repacked.repack(wide, tmp_path / "packed", trits(1, 256))
    done = export_gguf(str(packed), tmp_path / "out", verify=False)
    file = gguf_in(tmp_path / "out")
    assert file is not None and gguf_in(file) == file and gguf_in(packed) is None
    contents = read_gguf(file)
    assert sum(item.bytes for item in contents.items) == done.tensor_bytes
    assert contents.bits("compressed linears", "kept linears") == 2.0625
    rows = {(row.group, row.format): row for row in contents.ledger()}
    assert rows["compressed linears", "TQ2_0"].tensors == 14 and rows["embeddings", "F16"].tensors == 1
    assert sum(row.bytes for row in contents.ledger()) == file.stat().st_size
    for size in (4, 3000, file.stat().st_size - 100):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
        with pytest.raises(UserError, match="cannot be read as gguf"):
            read_gguf(tmp_path / "cut.gguf")
