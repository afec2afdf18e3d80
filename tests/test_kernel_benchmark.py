"""The pure parts of the kernels' benchmark: ratios, verdicts, tables. Nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kernel_attention, kernel_matrices, kernel_model, kernel_tables, kernel_timing
from benchmarks.kernel_parts import INT4PACK, Q4, READ, TORCH, TORCH_FP32


def row(name: str, seconds: float, nbytes: int = 1000, **facts: Any) -> dict[str, Any]:
    return {"name": name, "threads": 1, "bytes": nbytes, "times": [seconds, 2 * seconds, 2 * seconds], **facts}


def measured() -> list[dict[str, Any]]:
    rows = [row(READ, 1.0), row(TORCH, 10.0), row(INT4PACK, 4.0), row(Q4, 2.0)]
    rows += [row(kernel_tables.DENSE, 5.0, level=level, exact=False) for level in ("avx512", "avx2")]
    planes = (("avx512", 1.25, False), ("avx2", 2.0, False), ("avx512", 9.0, True))
    rows += [row(kernel_tables.PLANES, seconds, level=level, exact=exact) for level, seconds, exact in planes]
    several = [row(TORCH, 10.0), row(TORCH_FP32, 20.0), row(kernel_tables.PLANES, 4.0, level="avx512", exact=False)]
    loaded = [row(name, 1.0 * threads, threads=threads) for name in (TORCH, kernel_tables.PLANES) for threads in (1, 2)]
    model = [{**row(name, seconds), "prefill": [seconds], "made": ""} for name, seconds in
             ((kernel_model.ORIGINAL, 8.0), (kernel_model.FLOOR, 0.5), ("avx512", 1.0), ("torch", 5.0))]  # fmt: skip
    attention = [row(kernel_attention.TORCH_ATTENTION, 8e-6), row(kernel_attention.OURS, 2e-6, level="avx512")]
    shape = {"shape": [8, 16], "tokens": 1}
    return [
        {"part": "gemv", **shape, "rows": rows, "ggml": "1.0"},
        {"part": "tokens", "shape": [8, 16], "tokens": 512, "rows": several},
        {"part": "threads", **shape, "rows": rows},
        {"part": "load", **shape, "load": 1, "rows": loaded},
        {"part": "attention", "heads": [8, 2, 64], "context": 128, "rows": attention},
        {"part": "model", "sizes": [1, 2, 3, 4], "weights": 10**6, "prompt": 64, "rows": model},
        {"part": "layout", **shape, "rows": [{"name": "int4", "stored": 64, "bytes": 68, "seconds": 64e-9}]},
    ]


def test_a_ratio_is_of_rounds_that_both_took_part_in() -> None:
    ours = {"times": [1.0, None, 4.0, 1.0]}
    theirs = {"times": [2.0, 100.0, 12.0, 5.0]}
    assert kernel_timing.times_faster(ours, theirs) == 3
    assert kernel_timing.quantile(ours, 0.5) == 1


def test_contenders_take_turns_and_slow_ones_rest() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> kernel_timing.Contender:
        return kernel_timing.Contender({"name": name}, lambda: order.append(name) or seconds, 1)  # type: ignore[func-returns-value]

    rows = kernel_timing.interleave([contender("a", 1.0), contender("b", 9.0)], 5, patience=5.0)
    assert "".join(order[4:]) == "abaaaab"  # before that twice each, for nothing
    assert rows[1]["times"] == [9.0, None, None, None, 9.0]
    assert rows[0]["times"] == [1.0] * 5


@pytest.mark.parametrize(
    ("values", "lower", "end"),
    [
        ([9.5, 4.5], False, "**not met** (floor met)"),
        ([2.9], False, "**not met** (**below the floor**)"),
        ([5.0, 6.9], False, "met"),
        ([7.0], False, "met (stretch, too)"),
        ([1.0, 4.0], True, "**not met** (**below the floor**)"),
    ],
)
def test_the_worst_value_decides(values: list[float], lower: bool, end: str) -> None:
    goal = (3, 2, 1) if lower else (3, 5, 7)
    assert kernel_tables.verdict("x", values, goal, lower=lower).endswith(f": {end}")


def test_section_has_every_part_and_every_verdict() -> None:
    text = kernel_tables.kernels_section(measured())
    for words in (
        "share of the plain read, avx512 (8 x 16): 80 % (target 80 %): met",
        "share of the plain read, avx2 (8 x 16): 50 % (target 70 %): **not met** (**below the floor**)",
        "vs torch bf16 (8 x 16): 8.00x (target 9.00x): **not met** (floor met)",
        "vs own bf16 (8 x 16): 4.00x (target 3.70x): met",
        "vs llama.cpp Q4_0 (8 x 16): 1.60x (target 1.50x): met",
        "512 tokens vs torch bf16: 2.50x (target 1.70x): met (stretch, too)",
        "whole model after 64 tokens, avx512 vs bf16: 8.00x",
        "| 8 / 2 x 64 | 128 | 8 | 2 | 0.5 | 4.00x |",
        "int8 product vs bf16: 1.60x (target 2.00x): **not met** (floor met)",
        "two threads by one, 1 busy process: 2.00x (target 1.30x): **not met** (floor met)",
        "| 2 trit planes, avx512, exact |",
        "| int4 | 4.00 | 4.25 | 1.0 | 0.5 |",
        "llama.cpp's ggml 1.0",
    ):
        assert words in text, words


def test_what_was_not_measured_is_left_out() -> None:
    gemv = measured()[0]
    gemv = {**gemv, "ggml": None, "rows": [each for each in gemv["rows"] if each["name"] not in (Q4, INT4PACK)]}
    text = kernel_tables.kernels_section([gemv])
    assert "Q4_0" not in text and "ggml" not in text and "int4pack" not in text and "whole model" not in text
    assert kernel_tables.kernels_section([]).startswith("## Kernels")


@pytest.mark.parametrize("name", kernel_matrices.FORMATS)
def test_random_matrices_are_what_they_are_called(name: str) -> None:
    from compressor.formats.registry import format_of

    spec, parts = kernel_matrices.random_packed(name, 128, 256)
    dense = format_of(spec).unpack(parts, spec)
    assert dense.shape == (128, 256) and bool(torch.isfinite(dense).all()) and dense.std() > 0


def test_copies_have_memory_of_their_own() -> None:
    tensor = torch.arange(4)
    copies = kernel_matrices.rotation(tensor, 32, 96)
    addresses = [next(copies).data_ptr() for _ in range(6)]
    assert len({*addresses, tensor.data_ptr()}) == 4 and addresses[:3] == addresses[3:]


def test_a_model_without_products_gives_zeros() -> None:
    dense = kernel_model.original(64, 64, 1, 32)
    floor = kernel_model.emptied(dense)
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert not floor(ids).logits.any() and floor(ids).logits.shape == (1, 3, 32)
    assert dense(ids).logits.any()
