"""The native kernels against fp64: every instruction set, layout, dtype and way to multiply, over odd shapes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, HERE, Case, excess, numbers, quantized, whole_numbers
from torch import Tensor

from compressor.kernels import matrix as matrices
from compressor.kernels.matrix import Kind, Matrix, Way, multiplies_bf16
from compressor.kernels.native import LEVELS, Native
from compressor.kernels.records import trit_records

SHAPES = ((1, 1, 32), (7, 33, 64), (16, 128, 128), (17, 129, 32), (48, 256, 64), (50, 300, 128), (33, 172, 172),
          (113, 100, 1 << 20))  # fmt: skip
"""m, n, inputs that share a scale."""

TOKENS = (1, 2, 3, 4, 7, 12, 13, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernels_only(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is handed to PyTorch, however many tokens there are; one thread, unless a test says otherwise."""
    monkeypatch.setattr(matrices, "packed_tokens", lambda *_: 1 << 30)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def need(kernels: Native, level: str) -> None:
    if level not in kernels.levels:
        pytest.skip(f"this processor has no {level}")


def activations(tokens: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = numbers(seed, tokens, n)
    x = torch.randn(tokens, n, generator=g)
    x[:, :: max(1, n // 3)] *= 20  # outliers, as real activations have them
    return x.to(dtype)


def check(case: Case, x: Tensor, level: str, exact: bool, bias: Tensor | None = None) -> None:
    y = case.matrix.product(x, bias, level, exact)
    assert y.shape == (len(x), case.matrix.m) and y.dtype == x.dtype
    assert excess(case, x, y, bias, exact) <= 1, (case.matrix.kind, x.shape, x.dtype, level, exact, bias is None)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", HERE)
def test_products_are_those_of_fp64(level: str, name: str, kernels: Native) -> None:
    need(kernels, level)
    for index, (m, n, group) in enumerate(SHAPES):
        case = CASES[name](m, n, group, level)
        bias = torch.randn(m, generator=numbers(3, m, n))
        for place, tokens in enumerate(TOKENS):
            for exact in (False, True):
                dtype = DTYPES[(index + place + exact) % 3]
                check(case, activations(tokens, n, dtype), level, exact, bias if (index + place) % 2 else None)


def unpacked(matrix: Matrix, x: Tensor, bias: Tensor | None, level: str) -> Tensor:
    out = torch.full((len(x), matrix.m), float("nan"), dtype=x.dtype)
    matrix.multiply(x, bias, out, level, Way.UNPACKED)
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", HERE)
def test_matrices_that_are_unpacked_on_the_way(level: str, name: str, kernels: Native) -> None:
    """Sums are in fp32. Beside activations in bf16, where a processor multiplies these, weights are rounded to it."""
    need(kernels, level)
    for index, (m, n, group) in enumerate(SHAPES):
        case = CASES[name](m, n, group, level)
        bias = torch.randn(m, generator=numbers(3, m, n)) if index % 2 else None
        for place, tokens in enumerate((1, 2, 4, 5, 33)):
            dtype = DTYPES[(index + place) % 3]
            x = activations(tokens, n, dtype)
            y = unpacked(case.matrix, x, bias, level)
            if not multiplies_bf16(level, dtype):
                assert excess(case, x, y, bias, True) <= 1, (m, n, tokens, dtype)
                continue
            want = x.double() @ case.dense.bfloat16().double().T + (0 if bias is None else bias.double())
            # an entry that is nearly half way between two may be rounded to the other
            room = 2**-8 * want.abs() + 1e-4 * (x.double().abs() @ case.dense.abs().T) + 1e-6
            assert bool(((y.double() - want).abs() <= room).all()), (m, n, tokens)


@pytest.mark.parametrize("level", HERE)
def test_whole_numbers_unpacked_on_the_way(level: str, kernels: Native) -> None:
    need(kernels, level)
    for m, n in ((1, 5), (17, 129), (48, 256)):
        for tokens, dtype in ((1, torch.bfloat16), (3, torch.float32), (6, torch.bfloat16), (13, torch.float32)):
            x = torch.randint(-127, 128, (tokens, n), generator=numbers(6, tokens, n)).to(dtype)
            for case in whole_numbers(m, n, level):
                want = (x.double() @ case.dense.T).to(dtype)
                assert torch.equal(unpacked(case.matrix, x, None, level), want), (case.matrix.kind, m, n, tokens)
                spoiled = x.clone()
                spoiled[-1, 3] = float("inf")
                y = unpacked(case.matrix, spoiled, None, level)
                assert torch.equal(y[:-1], want[:-1])
                assert not bool(y[-1][case.dense[:, 3] != 0].isfinite().any())


def test_each_way_is_taken(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of tokens: the packed matrix, 16 rows at a time, all of it; and what comes out is the same."""
    level = LEVELS[kernels.best]
    case = CASES["partial-means"](50, 300, 128, level)
    taken: list[Way] = []
    multiply = Matrix.multiply
    monkeypatch.setattr(Matrix, "multiply", lambda *given: (taken.append(given[-1]), multiply(*given))[1])
    monkeypatch.setattr(matrices, "packed_tokens", lambda *_: 2)
    monkeypatch.setattr(matrices, "panel_tokens", lambda *_: 4)
    for tokens in range(1, 7):
        check(case, activations(tokens, 300, torch.float32), level, True)
    assert taken == [Way.EXACT, Way.EXACT, Way.UNPACKED, Way.UNPACKED]


@pytest.mark.parametrize("name", CASES)
def test_every_dtype_with_bias(name: str, kernels: Native) -> None:
    case = CASES[name](50, 300, 128, LEVELS[kernels.best])
    bias = torch.randn(50, generator=numbers(4, 50, 300))
    for dtype in DTYPES:
        for tokens in (1, 5):
            for exact in (False, True):
                check(case, activations(tokens, 300, dtype, 1), LEVELS[kernels.best], exact, bias)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", HERE)
def test_matrices_are_unpacked_as_stored(level: str, name: str, kernels: Native) -> None:
    need(kernels, level)
    for m, n, group in SHAPES:
        case = CASES[name](m, n, group, level)
        found = case.matrix.dense(torch.float32, level).double()
        torch.testing.assert_close(found, case.dense, rtol=3e-7, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(CASES)), st.integers(1, 70), st.integers(1, 300),
    st.sampled_from([32, 64, 96, 128, 1 << 20]), st.integers(1, 30), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 2),
)  # fmt: skip
def test_any_shape(
    kernels: Native, name: str, m: int, n: int, group: int, tokens: int, dtype: torch.dtype, exact: bool, level: int
) -> None:
    word = kernels.levels[min(level, len(kernels.levels) - 1)]
    check(CASES[name](m, n, group, word), activations(tokens, n, dtype), word, exact)


def test_more_tokens_than_are_held_at_once(kernels: Native) -> None:
    for name in ("trit2", "int4", "sign-means", "partial"):
        for exact in (False, True):
            case = CASES[name](70, 64, 64, LEVELS[kernels.best])
            check(case, activations(1003, 64, torch.float32), LEVELS[kernels.best], exact)


def test_sums_that_fill_their_registers(kernels: Native) -> None:
    """The largest entries and inputs there are, all of one sign: nothing may wrap around or saturate."""
    for level in kernels.levels:
        for sign in (1, -1):
            for tokens in (1, 5):
                x = torch.full((tokens, 4096), 127.0 * sign)
                x[0, ::2] *= -1
                for case in extremes(level):
                    check(case, x, level, False)
                    check(case, x, level, True)


def extremes(level: str) -> list[Case]:
    from compressor.kernels.records import int_records, sign_records, trit_records

    m, n, group, out = 16, 4096, 128, []
    ones = torch.ones(m, n, dtype=torch.int8)
    scale = torch.ones(m, n // group)
    for value in (1, -1):
        for planes in (1, 2, 3):
            same = scale.half().expand(planes, -1, -1).contiguous()
            entries = (ones * value).expand(planes, -1, -1).contiguous()
            out.append(Case(trit_records(entries, same, group, level), [entries.double().sum(0)]))
        plus = ones == value
        out.append(Case(sign_records(plus, scale.half(), None, group), [plus.double() * 2 - 1]))
        for bits in (2, 3, 4, 8):
            most = (1 << (bits - 1)) - 1 if value > 0 else -(1 << (bits - 1))
            codes = ones * most
            for zero in (None, torch.full_like(scale, -most - 1).to(torch.int8)):
                shift = 0 if zero is None else -most - 1
                out.append(Case(int_records(codes, scale, zero, bits, group), [codes.double() - shift]))
    return out


@pytest.mark.parametrize("level", HERE)
def test_whole_numbers_come_out_exactly(level: str, kernels: Native) -> None:
    """The sums are the same integers on every instruction set: what fp32 can say of them is said to the last bit."""
    need(kernels, level)
    for m, n in ((1, 5), (17, 129), (48, 256)):
        for tokens in (1, 2, 3, 4, 5, 12, 13):
            x = torch.randint(-127, 128, (tokens, n), generator=numbers(6, tokens, n)).float()
            x[:, ::32] = 127  # so that rounding changes nothing
            for case in whole_numbers(m, n, level):
                for exact in (False, True):
                    y = case.matrix.product(x, None, level, exact)
                    assert torch.equal(y.double(), x.double() @ case.dense.T), (case.matrix.kind, m, n, tokens, exact)
                for dtype in DTYPES[1:]:
                    narrow = case.matrix.product(x.to(dtype), None, level, True)
                    assert torch.equal(narrow, y.to(dtype)), (case.matrix.kind, m, n, tokens, dtype)


@pytest.mark.parametrize("level", HERE)
def test_activations_are_rounded_to_the_same_integers(level: str, kernels: Native) -> None:
    """One group: an integer times the scale of the activations, rounded once, whatever the activations are."""
    need(kernels, level)
    levels = (Kind.TRIT1, Kind.INT2, Kind.INT3, Kind.INT4, Kind.INT8)
    for n in (7, 64):
        cases = [case for case in whole_numbers(33, n, level) if case.matrix.kind in levels]
        assert len(cases) == len(levels)
        for tokens in (1, 3, 4, 13):
            for dtype in DTYPES:
                x = activations(tokens, n, dtype)
                q, scale = quantized(x, 64)
                for case in cases:
                    whole = q[:, 0, :n].double() @ case.dense.T
                    y = case.matrix.product(x.float(), None, level, False)
                    assert torch.equal(y, whole.float() * scale[:, 0]), (case.matrix.kind, n, tokens, dtype)


def test_strides(kernels: Native) -> None:
    level = LEVELS[kernels.best]
    case = CASES["trit2"](50, 300, 128, level)
    wide = activations(14, 600, torch.float32)
    for x in (wide[:, ::2], wide[::2, 300:], wide[:, :300], wide[:, :300].flip(0), wide.T[:300].T, wide[3:5, 1:301]):
        check(case, x, level, False)
        assert torch.equal(
            case.matrix.product(x, None, level, False), case.matrix.product(x.clone(), None, level, False)
        )


def test_another_width_is_refused_and_any_number_of_dimensions_kept(kernels: Native) -> None:
    """Kernels know addresses only: what is too narrow would be read beyond its end."""
    level = LEVELS[kernels.best]
    for name in CASES:
        matrix = CASES[name](50, 300, 128, level).matrix
        for n in (299, 301):
            with pytest.raises(ValueError, match=f"50 x 300 cannot multiply inputs of \\(2, {n}\\)"):
                matrix.product(torch.zeros(2, n), None, level, False)
        x = activations(14, 300, torch.float32)
        deep = matrix.eager_product(x.view(2, 7, 300), None, level, False)
        assert torch.equal(deep, matrix.product(x, None, level, False).view(2, 7, 50)), name


@pytest.mark.parametrize("again", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_a_copy_has_memory_of_its_own(again: Callable[[Matrix], Matrix], kernels: Native) -> None:
    """Also of a matrix that has been multiplied with, and knows its addresses."""
    matrix, x = CASES["trit2"](32, 256, 128, "portable").matrix, torch.randn(1, 256)
    want = matrix.product(x, None, "portable", False)
    other = again(matrix)
    matrix.data.zero_()
    assert torch.equal(other.product(x, None, "portable", False), want)
    assert not torch.equal(matrix.product(x, None, "portable", False), want)


def test_no_tokens_and_a_token_of_zeros(kernels: Native) -> None:
    level = LEVELS[kernels.best]
    for name in CASES:
        case = CASES[name](50, 300, 128, level)
        assert case.matrix.product(torch.empty(0, 300), None, level, False).shape == (0, 50)
        bias = torch.randn(50)
        for exact in (False, True):
            for tokens in (1, 5):
                y = case.matrix.product(torch.zeros(tokens, 300), bias, level, exact)
                assert torch.equal(y, bias.expand(tokens, -1)), name


@pytest.mark.parametrize("level", HERE)
def test_tiny_activations(level: str, kernels: Native) -> None:
    """Groups below 1e-30 count as zero; denormal numbers are not an accident, and one does not slow or spoil others."""
    need(kernels, level)
    for name in CASES:
        case = CASES[name](50, 300, 128, level)
        for tokens in (1, 5):
            for exact in (False, True):
                x = activations(tokens, 300, torch.float32)
                x[0] = 1e-40
                x[-1, :128] = 1e-38
                check(case, x, level, exact)
            half = torch.full((tokens, 300), 6e-8, dtype=torch.float16)  # the smallest there is
            check(case, half, level, False)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_token(level: str, dtype: torch.dtype, kernels: Native) -> None:
    need(kernels, level)
    for name in CASES:
        case = CASES[name](50, 300, 128, level)
        for bad in (float("inf"), float("-inf"), float("nan")):
            for tokens in (1, 3, 5, 13):
                clean = activations(tokens, 300, dtype)
                spoiled = clean.clone()
                spoiled[-1, 7] = bad
                for exact in (False, True):
                    y = case.matrix.product(spoiled, None, level, exact)
                    kept = case.matrix.product(clean, None, level, exact)
                    assert torch.equal(y[:-1], kept[:-1])
                    if not exact and case.matrix.kind < Kind.SPARSE_BF16:
                        assert bool(y[-1].isnan().all()), (name, bad)
                    else:  # as an ordinary product: an infinity or NaN where the entry is not zero
                        touched = case.dense[:, 7] != 0
                        assert not bool(y[-1][touched].isfinite().any()), (name, bad)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("word", [0x7F800001, 0x7FC00000, -0x007FFFFF, -1])
def test_a_nan_is_one_whatever_its_bits(word: int, level: str, kernels: Native) -> None:
    """Some have nothing but zeros in the half that bf16 keeps."""
    need(kernels, level)
    x = activations(2, 300, torch.float32)
    x[1, 7] = torch.tensor(word, dtype=torch.int32).view(torch.float32)
    assert x[1, 7].isnan()
    for name in CASES:
        case = CASES[name](50, 300, 128, level)
        for exact in (False, True):
            y = case.matrix.product(x, None, level, exact)
            assert bool(y[1][case.dense[:, 7] != 0].isnan().all()), (name, exact)
            assert bool(y[0].isfinite().all()), (name, exact)


@pytest.mark.parametrize("level", HERE)
def test_exact_is_exact_over_the_whole_range_of_activations(level: str, kernels: Native) -> None:
    """One entry of a row is not zero: its product with an activation of any size is rounded once, if at all."""
    need(kernels, level)
    g, n = torch.Generator().manual_seed(12), 128
    x = torch.randn(40, n, generator=g) * torch.exp2(torch.randint(-90, 90, (40, n), generator=g))
    scale = torch.full((n, 1), 0.5).half()
    trits = torch.eye(n, dtype=torch.int8) * torch.randint(0, 2, (n, 1), generator=g).mul(2).sub(1).to(torch.int8)
    made = trit_records(trits[None], scale[None], n, level)
    for dtype in (torch.float32, torch.bfloat16):
        y = made.product(x.to(dtype), None, level, True)
        assert torch.equal(y, x.to(dtype) * trits.diagonal() * 0.5)


def test_integers_read_back_what_was_packed(kernels: Native) -> None:
    """`read_records` is the inverse of `pack_records`."""
    g = torch.Generator().manual_seed(5)
    planes = {Kind.TRIT1: (1, 3), Kind.TRIT2: (2, 3), Kind.TRIT3: (3, 3), Kind.INT2: (1, 4), Kind.INT4: (1, 16),
              Kind.INT8: (1, 256), Kind.SIGN: (1, 2)}  # fmt: skip
    for kind, (count, most) in planes.items():
        for kb in (32, 64, 128):
            for m, n in ((1, 1), (17, 129), (32, 256)):
                entries = torch.randint(0, most, (count, m, n), generator=g).to(torch.uint8)
                tiles, records, tail = -(-m // 16), -(-n // kb), 128 if kind is Kind.TRIT3 else 64
                tails = torch.randint(0, 256, (tiles, records, tail), generator=g).to(torch.uint8)
                bits = {Kind.TRIT1: 2, Kind.TRIT2: 4, Kind.TRIT3: 6, Kind.INT2: 2, Kind.INT4: 4, Kind.INT8: 8}
                size = tiles * records * (2 * bits.get(kind, 1) * kb + tail)
                data, back = torch.empty(size, dtype=torch.uint8), torch.full_like(entries, 255)
                table = torch.ones(tiles * records * 16, dtype=torch.uint8)
                kernels.module.pack_records(
                    kind, m, n, kb, entries.data_ptr(), tails.data_ptr(), data.data_ptr(), size, 2
                )
                kernels.module.read_records(
                    kind, m, n, kb, 1.0, data.data_ptr(), size, table.data_ptr(), table.nbytes, back.data_ptr(), 2
                )
                assert torch.equal(back, entries), kind
