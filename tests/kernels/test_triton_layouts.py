"""How packed matrices lie in GPU memory: every layout gives back what its format unpacks. Torch alone, no Triton."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_matrices import integers, signs, stored, trits

import compressor.kernels.triton as kernels
from compressor.formats.registry import format_of
from compressor.kernels.triton import layouts, sparse_signs
from compressor.kernels.triton.layouts import Planes, held_bits, pack_fields, run_for, unpack_fields

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def check(matrix: Any, dtype: torch.dtype) -> Any:
    parts, spec = stored(matrix, dtype)
    layout = kernels.prepare(parts, spec, "cpu")
    assert torch.equal(layout.dense(), format_of(spec).unpack(parts, spec))
    assert layout.m == spec["shape"][0]
    return layout


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 9), n=st.integers(1, 700), planes=st.integers(1, 3), group=st.integers(1, 8), dtype=DTYPES,
    seed=st.integers(0, 99), chunk=st.sampled_from([1, 300, 1 << 22]),
)  # fmt: skip
def test_trit_planes(m: int, n: int, planes: int, group: int, dtype: torch.dtype, seed: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "ROWS_CHUNK", chunk)
        layout = check(trits(m, n, planes=planes, group=min(n, 32 * group), seed=seed), dtype)
    assert layout.padded % 128 == 0
    assert layout.padded < n + 128


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 40), groups=st.integers(1, 5), group=st.sampled_from([32, 64, 96, 128, 160, 384]),
    bits=st.integers(2, 8), zeros=st.booleans(), dtype=DTYPES, chunk=st.sampled_from([1, 300, 1 << 22]),
)  # fmt: skip
def test_group_integers(
    m: int, groups: int, group: int, bits: int, zeros: bool, dtype: torch.dtype, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "ROWS_CHUNK", chunk)
        layout = check(integers(m, groups * group, bits=bits, group=group, zeros=zeros), dtype)
    assert layout.bits == {2: 2, 3: 4, 4: 4}.get(bits, 8)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 9), n=st.integers(1, 400), group=st.integers(1, 12), mean=st.booleans(), zeros=st.booleans(),
    by_input=st.booleans(), bits=st.integers(2, 8), share=st.sampled_from([0.0, 0.02, 0.1]), dtype=DTYPES,
    seed=st.integers(0, 99), chunk=st.sampled_from([1, 300, 1 << 22]),
)  # fmt: skip
def test_signs_with_salient_weights(
    m: int, n: int, group: int, mean: bool, zeros: bool, by_input: bool, bits: int, share: float, dtype: torch.dtype,
    seed: int, chunk: int,
) -> None:  # fmt: skip
    matrix = signs(m, n, group=min(n, 16 * group), mean=mean, zeros=zeros, by_input=by_input, bits=bits, share=share,
                   seed=seed)  # fmt: skip
    if int(matrix.salient.sum()) > sparse_signs.MOST_SALIENT * m * n:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "ROWS_CHUNK", chunk)
        check(matrix, dtype)


def test_a_whole_row_may_be_one_group_of_any_width() -> None:
    assert check(trits(3, 77, group=77), torch.float32).run == 32
    assert check(integers(3, 77, group=77), torch.float32).run == 64


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_shift_and_an_and_give_four_consecutive_codes(bits: int) -> None:
    """What the kernels rely on, said of single bits: input ``f * run + c`` of a block is field f of byte c."""
    run, fields = 32, 8 // bits
    codes = torch.randint(0, 2**bits, (2, 3 * fields * run), dtype=torch.uint8)
    words = pack_fields(codes, bits, run)
    assert torch.equal(unpack_fields(words, bits, run).view(torch.uint8), codes)
    block, field, byte = 2, fields - 1, 5
    word = int(words[1, block * run // 4 + byte // 4]) & 0xFFFFFFFF
    assert word >> (8 * (byte % 4) + field * bits) & (2**bits - 1) == codes[1, (block * fields + field) * run + byte]


def test_runs_divide_groups() -> None:
    assert [run_for(2, group, 4096) for group in (128, 64, 32, 96, 4096, 48, 16)] == [32, 32, 32, 32, 32, None, None]
    assert [run_for(4, group, 4096) for group in (128, 64, 32, 96)] == [64, 64, 32, 32]
    assert [run_for(8, group, 4096) for group in (256, 128, 64, 32, 160)] == [128, 128, 64, 32, 32]
    assert [held_bits(bits) for bits in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


def test_memory_is_what_was_promised() -> None:
    parts, spec = stored(trits(64, 1024), torch.bfloat16)
    assert kernels.prepare(parts, spec, "cpu").nbytes * 8 == 64 * 1024 * 4.25
    parts, spec = stored(integers(64, 1024), torch.float32)
    layout = kernels.prepare(parts, spec, "cpu")
    assert isinstance(layout, Planes)
    assert layout.scale.dtype == torch.float16  # nothing is lost: the scales are portable
    assert layout.nbytes * 8 == 64 * 1024 * 4.125


def test_what_is_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, spec = stored(trits(4, 256, group=48), torch.float32)
    assert "48" in str(layouts.planes_reason(spec))
    with pytest.raises(ValueError, match="groups of 48"):
        kernels.prepare(parts, spec, "cpu")
    parts, spec = stored(signs(8, 256, share=0.5), torch.float32)
    with pytest.raises(ValueError, match="salient"):
        kernels.prepare(parts, spec, "cpu")
    _, spec = stored(trits(4, 256), torch.float64)
    assert layouts.planes_reason(spec) == "values are float64"
    with pytest.raises(ValueError, match="nm"):
        kernels.prepare({}, {"format": "nm"}, "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = kernels.supports(spec, "cpu")
    assert reason in ("the package triton is not installed", "the device cpu is not a CUDA GPU")


def test_a_part_that_does_not_fit_is_refused() -> None:
    parts, spec = stored(trits(4, 256), torch.float32)
    with pytest.raises(ValueError, match="scale"):
        kernels.prepare({**parts, "scale": parts["scale"][:1]}, spec, "cpu")


def test_nothing_of_it_imports_triton() -> None:
    import subprocess

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import compressor.kernels.triton as k, compressor.kernels.triton.ops, compressor.kernels.triton.tiles\n"
        "assert k.supports({'format': 'trit-planes'}, 'cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
