"""``bench``: numbers that are there and agree with each other, bytes against sums by hand, refusals. No times."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from compressor.errors import UserError
from compressor.hf.linear import PackedLinear
from compressor.kernels.layers import Fast
from compressor.kernels.native import VARIABLE, native, using
from compressor.kernels.stock import Int8Chunks, has_int8
from compressor.report.schema_bench import Bench
from compressor.run import bench as benching
from compressor.run.bench import bench, default_base
from compressor.run.bench_measure import bytes_read, held_bytes, products, with_our_product
from compressor.run.progress import Voice

TRITS = {"quantize": {"method": "trit-planes", "planes": 2, "group": 32}}
needs_kernels = pytest.mark.skipif(native() is None or not native().best, reason="no kernels")  # type: ignore[union-attr]
pytestmark = pytest.mark.usefixtures("little_memory")
SHORT: dict[str, Any] = {"contexts": (0, 8), "steps": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def packed(llama: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder beside the folder of its source."""
    place = tmp_path_factory.mktemp("bench")
    shutil.copytree(llama, place / "llama")
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, TRITS), place / "llama", place / "packed")
    return place / "packed"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check_numbers(result: Bench, batches: tuple[int, ...] = (1,)) -> None:
    """Every number is positive, and those that follow from others do."""
    places = [(context, batch) for batch in batches for context in (0, 8)]
    first = result.ways[0]
    assert first.name == "model" and first.load_seconds is not None
    assert min(result.peak_rss_bytes, result.bandwidth.bytes_per_second, result.seconds, result.threads) > 0
    for way in result.ways:
        assert way.held_bytes > way.layout_bytes >= 0
        assert [(row.context, row.batch) for row in way.decode] == places
        assert [(row.prompt, row.batch) for row in way.prefill] == [place for place in places if place[0]]
        for row, ours in zip(way.decode, first.decode, strict=True):
            assert row.seconds > 0 and row.cache_bytes > 0
            assert 0 < row.weight_bytes <= way.held_bytes + 4 * 32 * row.batch  # a tied embedding is read twice
            assert row.tokens_per_second == pytest.approx(row.batch / row.seconds)
            assert row.bytes_per_second == pytest.approx((row.weight_bytes + row.cache_bytes) / row.seconds)
            assert row.bandwidth_fraction == pytest.approx(row.bytes_per_second / result.bandwidth.bytes_per_second)
            assert row.speedup == (None if way is first else pytest.approx(row.seconds / ours.seconds))
        for prompt, ours_ in zip(way.prefill, first.prefill, strict=True):
            assert prompt.tokens_per_second == pytest.approx(prompt.prompt * prompt.batch / prompt.seconds)
            assert prompt.speedup == (None if way is first else pytest.approx(prompt.seconds / ours_.seconds))


def test_against_the_base_that_the_report_names(packed: Path) -> None:
    threads = torch.get_num_threads()
    result = bench(str(packed), batches=(1, 3), threads=2, **SHORT)
    check_numbers(result, (1, 3))
    assert (result.model, result.base, result.threads) == ("packed", "llama", 2)
    assert torch.get_num_threads() == threads
    names = [(way.name, way.dtype) for way in result.ways]
    assert names[:3] == [("model", "float32"), ("base", "float32"), ("base in bfloat16", "bfloat16")]
    assert result.ways[0].products == {"unpacking": 14, "torch": 1} and result.ways[1].products == {"torch": 15}
    if native() is not None and native().best:  # type: ignore[union-attr]
        assert names[3:] == [("base, our product", "bfloat16")]
        assert not [note for note in result.notes if "other programs were running" not in note]
        assert result.ways[3].products == {"our bf16 product": 15} and result.ways[3].load_seconds is None
    assert Bench.model_validate_json(result.model_dump_json()) == result


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_by_the_kernels(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx2")
    result = bench(str(packed), **SHORT)
    check_numbers(result)
    assert result.rung == "avx2" and result.activations == "int8"
    assert result.ways[0].products == {"avx2": 14, "torch": 1} and result.ways[0].layout_bytes > 0


def test_bytes_of_a_plain_model(llama: Path) -> None:
    """A step reads every parameter once, and of the embedding, which is the head too, one row more."""
    model = load(llama)
    parameters = sum(each.nbytes for each in model.parameters())
    assert held_bytes(model) == (parameters, 0)
    result = bench(str(llama), **SHORT)
    assert result.base is None and "no report" in result.notes[0] and len(result.ways) == 1
    row, width = result.ways[0].decode[0], model.config.hidden_size
    assert result.ways[0].held_bytes == parameters and row.weight_bytes == parameters + 4 * width
    heads = 2 * model.config.num_key_value_heads * width // model.config.num_attention_heads
    cached = 4 * heads * model.config.num_hidden_layers
    assert (row.cache_bytes - 3 * cached) // cached in (1, 2)  # 1 + 2 tokens before the three that were timed


def test_bytes_of_packed_parts(packed: Path) -> None:
    """Without kernels what is held is what is on disk, but for headers; a step reads all of it, and a row."""
    with using("packed"):
        model = load(packed)
    parts = sum(part.nbytes for m in model.modules() if isinstance(m, PackedLinear) for part in m.parts.values())
    parameters = sum(each.nbytes for each in model.parameters())
    assert held_bytes(model) == (parts + parameters, 0)
    row = bench(str(packed), base=None, **SHORT).ways[0].decode[0]
    assert row.weight_bytes == parts + parameters + 4 * model.config.hidden_size


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_bytes_of_layouts(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that several layers share counts once, and what it stands for is not held beside it."""
    monkeypatch.setenv(VARIABLE, "avx2")
    model = load(packed)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    fast: list[Fast] = [m.fast for m in layers]
    assert any(each.group for each in fast)
    laid_out = sum(each.product.nbytes for each in fast)
    kept = sum(part.nbytes for m in layers for part in m.buffers(recurse=False))
    assert kept < sum(part.nbytes for m in layers for part in m.parts.values())
    parameters = sum(each.nbytes for each in model.parameters())
    assert held_bytes(model) == (laid_out + kept + parameters, laid_out)
    assert sum(bytes_read(m, 1, model.config) for m in layers) == laid_out
    assert products(model)[0] == {"avx2": 14, "torch": 1}


@pytest.mark.skipif(not has_int8(), reason="PyTorch's int8 product is not here, or slow on this processor")
@pytest.mark.usefixtures("by_the_package")
def test_bytes_of_pytorchs_products(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are in no tensor count; a step reads them, and a prompt the plain matrix that is held beside them."""
    monkeypatch.setenv(VARIABLE, "torch")
    model = load(packed)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear) and isinstance(m.fast.product, Int8Chunks)]
    assert len(layers) == 14
    weights = sum(m.in_features * m.out_features for m in layers)
    scales = sum(4 * m.out_features for m in layers)  # of one chunk each
    assert held_bytes(model)[1] == weights + scales + 4 * weights
    assert sum(bytes_read(m, 1, model.config) for m in layers) == weights + scales
    assert sum(bytes_read(m, 8, model.config) for m in layers) == 4 * weights


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_our_product_is_the_same_model(llama: Path) -> None:
    """On the same tensors, up to rounding; the model it was made from is as it was."""
    model, ids = load(llama, torch.bfloat16), tiny_models.random_ids(2)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        twin = with_our_product(model, "avx2")
        found = twin(input_ids=ids[:1, :3]).logits
        assert torch.equal(model(input_ids=ids).logits, want)
    assert (found.float() - want[:1, :3].float()).abs().max() <= 0.03 * want.float().abs().max()
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert products(model)[0] == {"torch": 15} and products(twin)[0] == {"our bf16 product": 15}


def test_experts_count_as_far_as_they_are_asked() -> None:
    mixture = tiny_models.random_model("mixtral")
    fused = next(m for m in mixture.modules() if any(p.ndim == 3 for p in m.parameters(recurse=False)))
    whole = sum(p.nbytes for p in fused.parameters(recurse=False))
    assert [bytes_read(fused, batch, mixture.config) for batch in (1, 2, 9)] == [whole // 2, whole, whole]


def test_where_a_base_is_looked_for(packed: Path, llama: Path, tmp_path: Path) -> None:
    assert default_base(packed) == (str(packed.parent / "llama"), "")
    assert default_base(llama)[0] is None
    shutil.copytree(packed, tmp_path / "alone")
    name, why = default_base(tmp_path / "alone")
    assert name is None
    assert why == "llama, from which it was made, is neither beside it nor here; --base FOLDER says where it is"


def test_a_base_that_is_elsewhere_is_told_before_the_work(
    packed: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain model has none, and nothing is said."""
    shutil.copytree(packed, tmp_path / "alone")
    monkeypatch.setattr(benching, "_load", None)
    for folder, words in ((tmp_path / "alone", "warning: not held against a base: llama, from which"), (llama, "")):
        said = io.StringIO()
        with pytest.raises(TypeError):  # there is nothing to load it with
            bench(str(folder), voice=Voice(Console(file=said, width=500)), **SHORT)
        assert said.getvalue().startswith(words) and bool(words) == bool(said.getvalue())
        assert not words or "--base FOLDER says where it is" in said.getvalue()


def test_what_is_refused(packed: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded or measured."""
    monkeypatch.setattr(benching, "_load", None)
    monkeypatch.setattr(benching, "measure_bandwidth", None)
    others = tiny_models.save(tiny_models.random_model("llama", vocab_size=400), tmp_path / "others")
    for options, words in (
        ({"contexts": (0, 62)}, "62 tokens and 5 more do not fit the model's context of 64"),
        ({"contexts": (-1,)}, "-1 tokens"),
        ({"contexts": ()}, "do not fit"),
        ({"steps": 64, "contexts": None}, "fewer --tokens"),
        ({"steps": 0}, "no tokens"),
        ({"batches": (0,)}, "a row"),
        ({"threads": 0}, "no threads"),
        ({"device": "abacus"}, "abacus"),
        ({"dtype": "int4"}, "int4"),
        ({"base": str(others)}, "has 400 tokens"),
        ({"base": str(tmp_path / "absent")}, "no model at"),
    ):
        with pytest.raises(UserError, match=words):
            bench(str(packed), **{"contexts": (0,), "steps": 2, **options})
    with pytest.raises(UserError, match="no model at"):
        bench(str(tmp_path / "absent"))
    monkeypatch.setattr(benching, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="are free"):
        bench(str(llama))
    monkeypatch.setenv(VARIABLE, "avx3")
    with pytest.raises(UserError, match="avx3"):
        bench(str(llama))
