"""How the kernels are called: threads, forks, and arguments that do not fit."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from kernel_cases import CASES, numbers
from torch import Tensor

from compressor.kernels import matrix as matrices
from compressor.kernels.matrix import DTYPES, Kind, Matrix, Way
from compressor.kernels.native import LEVELS, Native

SOME = ("trit2", "trit3", "int3", "int8-zeros", "sign", "partial-means", "sparse8", "sparse-bf16", "dense-fp16")


@pytest.fixture(autouse=True)
def kernels_only(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is handed to PyTorch, however many tokens there are; one thread, unless a test says otherwise."""
    monkeypatch.setattr(matrices, "packed_tokens", lambda *_: 1 << 30)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers(level: str, names: tuple[str, ...] = SOME, m: int = 200) -> list[Tensor]:
    out = []
    for name in names:
        matrix = CASES[name](m, 300, 128, level).matrix
        for tokens in (1, 3, 5, 13):
            x = torch.randn(tokens, 300, generator=numbers(1, tokens, 300))
            out += [matrix.product(x, None, level, exact) for exact in (False, True)]
            for dtype in (torch.float32, torch.bfloat16):
                out.append(torch.empty(tokens, m, dtype=dtype))
                matrix.multiply(x.to(dtype), None, out[-1], level, Way.UNPACKED)
        if name != "dense-fp16":
            out.append(matrix.dense(torch.float32, level))
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_same_bytes_for_any_number_of_threads(kernels: Native) -> None:
    for number, level in enumerate(kernels.levels):
        torch.set_num_threads(1)
        want = answers(level)
        for threads in random.Random(number).sample(range(2, 40), 4):
            torch.set_num_threads(threads)
            assert same(answers(level), want), (level, threads)


def test_many_python_threads_at_once(kernels: Native) -> None:
    """Only one of them has the pool; the others do their work by themselves. Nobody waits, nobody mixes up sums."""
    level = LEVELS[kernels.best]
    want = answers(level, SOME[:4])
    torch.set_num_threads(3)
    with ThreadPoolExecutor(16) as threads:
        for found in threads.map(lambda _: answers(level, SOME[:4]), range(32)):
            assert same(found, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(kernels: Native) -> None:
    """Also one that is forked while another thread is in the pool, and a child of the child."""
    level = LEVELS[kernels.best]
    case = CASES["trit2"](2000, 300, 128, level).matrix
    x = torch.randn(1, 300)
    torch.set_num_threads(4)
    want = case.product(x, None, level, False)
    done = False

    def busy() -> None:
        while not done:
            case.product(x, None, level, False)

    with ThreadPoolExecutor(1) as threads:
        work = threads.submit(busy)
        try:
            for _ in range(5):
                assert child(case, x, want, level, depth=2) == 0
        finally:
            done = True
        work.result()
    assert torch.equal(case.product(x, None, level, False), want)


def child(case: Matrix, x: Tensor, want: Tensor, level: str, depth: int) -> int:
    """Exit code of a forked process that multiplies, and forks again."""
    gc.disable()
    process = os.fork()
    if not process:  # raw calls: nothing of PyTorch's own threads is used here
        code = 1
        try:
            out = torch.full_like(want, -1)
            for _ in range(20):
                call(case, x, out, level, threads=4)
            code = 0 if bytes(memoryview(out.numpy())) == bytes(memoryview(want.numpy())) else 2
            if depth > 1 and not code:
                code = child(case, x, want, level, depth - 1)
        finally:
            os._exit(code)
    gc.enable()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def call(matrix: Matrix, x: Tensor, out: Tensor, level: str, threads: int) -> None:
    from compressor.kernels.native import native

    found = native()
    assert found is not None
    found.module.linear(*words(matrix, x, out, level=LEVELS.index(level), threads=threads).values())


def words(matrix: Matrix, x: Tensor, out: Tensor, /, **changed: Any) -> dict[str, Any]:
    """The arguments of `linear`, by name."""
    size = matrix.data.numel() * matrix.data.element_size()
    found: dict[str, Any] = {
        "kind": int(matrix.kind), "m": matrix.m, "n": matrix.n, "kb": matrix.kb, "factor": matrix.factor,
        "data": matrix.data.data_ptr(), "bytes": size, "extra": 0 if matrix.extra is None else matrix.extra.data_ptr(),
        "more": 0 if matrix.extra is None else matrix.extra.nbytes,
        "x": x.data_ptr(), "dtype": DTYPES[x.dtype], "tokens": len(x), "out": out.data_ptr(), "bias": 0, "way": 0,
        "threads": 1, "level": 0,
    }  # fmt: skip
    assert not changed.keys() - found.keys()
    return found | changed


def wrong_words(matrix: Matrix) -> list[dict[str, Any]]:
    data = matrix.data.data_ptr()
    size = matrix.data.numel() * matrix.data.element_size()
    values: dict[str, list[Any]] = {
        "kind": [0, 15, -1, 1 << 40, 1 << 70, 2.0, None, "2"],
        "m": [0, -1, 1 << 31, 1 << 62, (1 << 31) - 1],
        "n": [0, -5, 1 << 31, 1 << 62, (1 << 31) - 1],
        "kb": [0, 1, 16, 31, 33, 48, 96, 127, 129, 256, 1 << 40],
        "factor": ["one", None],
        "data": [0, -1, data + 1, data + 8, data + 32, None, "x", 1 << 70],
        "bytes": [-1, 0, 1 << 60],
        "x": [0, None, 1.5],
        "dtype": [-1, 3, 1 << 33],
        "tokens": [0, -1, 1 << 31, 1 << 62],
        "out": [0, None],
        "bias": [2, 3, None],
        "way": [-1, 3],
        "threads": [0, -1, 1025],
        "level": [-1, len(LEVELS)],
    }
    values["m"].append(matrix.m + 16)
    if matrix.kind <= Kind.SIGN:
        values["n"].append(matrix.n + 128)
        values["bytes"] += [size - 1, size + 1, size + 64]
    elif matrix.kind <= Kind.SPARSE_FP16:
        values["bytes"] += [size - 1, size // 2]
        values["kb"] += [32, 64]
        values["extra"] = [0, matrix.extra.data_ptr() + 4 if matrix.extra is not None else 4]
    else:
        values["bytes"] += [size - 2, size + 2]
        values["n"].append(matrix.n + 1)
    if matrix.kind in (Kind.TRIT2, Kind.TRIT3):
        values["extra"] = [0]
        values["more"] = [0, -1, matrix.extra.nbytes - 16 if matrix.extra is not None else 16]
    return [{name: value} for name, all_ in values.items() for value in all_]


@pytest.mark.parametrize("name", SOME)
def test_what_does_not_fit_is_an_error(name: str, kernels: Native) -> None:
    matrix = CASES[name](50, 300, 128, "portable").matrix
    x, out = torch.randn(2, 300), torch.full((2, 50), -7.0)
    linear = kernels.module.linear
    for changed in wrong_words(matrix):
        with pytest.raises(ValueError, match="does not fit"):
            linear(*words(matrix, x, out, **changed).values())
    right = list(words(matrix, x, out).values())
    for count in range(len(right)):
        with pytest.raises(ValueError, match="does not fit"):
            linear(*right[:count])
    with pytest.raises(ValueError, match="number of arguments"):
        linear(*right, 0)
    assert bool((out == -7).all())
    linear(*right)
    assert not bool((out == -7).any())


def test_numbers_off_their_alignment_are_an_error(kernels: Native) -> None:
    matrix = CASES["trit2"](50, 300, 128, "portable").matrix
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, out = torch.randn(3, 300).to(dtype), torch.empty(3, 50, dtype=dtype)
        for name, value in (("x", x), ("out", out)):
            with pytest.raises(ValueError, match=f"alignment of {name}"):
                kernels.module.linear(*words(matrix, x, out, **{name: value.data_ptr() + 1}, tokens=2).values())


def test_starts_that_are_wrong_are_refused(kernels: Native) -> None:
    x, out = torch.randn(1, 300), torch.empty(1, 50)
    for name in ("partial", "sparse8", "sparse-bf16", "sparse-fp16"):
        matrix = CASES[name](50, 300, 128, "portable").matrix
        assert matrix.extra is not None
        good = matrix.extra.clone()
        for place, value in ((0, 1), (0, -1), (1, -1), (1, int(good[-1]) + 1), (-1, int(good[-1]) + 65), (-1, 0),
                             (2, int(good[1]) - 1), (-1, 1 << 62)):  # fmt: skip
            bad = good.clone()
            bad[place] = value
            with pytest.raises(ValueError, match="starts"):
                kernels.module.linear(*words(matrix, x, out, extra=bad.data_ptr()).values())
            with pytest.raises(ValueError, match="starts"):
                unpack = [
                    *list(words(matrix, x, out, extra=bad.data_ptr()).values())[:9],
                    torch.empty(50, 300).data_ptr(),
                ]
                kernels.module.unpack(*unpack, 1, 0)


def test_levels_that_the_processor_has_not_are_refused(kernels: Native) -> None:
    matrix = CASES["trit2"](50, 300, 128, "portable").matrix
    x, out = torch.randn(1, 300), torch.empty(1, 50)
    for number, level in enumerate(LEVELS):
        arguments = words(matrix, x, out, level=number).values()
        if level in kernels.levels:
            kernels.module.linear(*arguments)
        else:
            with pytest.raises(ValueError, match="instruction set"):
                kernels.module.linear(*arguments)


def test_other_entries_check_their_arguments(kernels: Native) -> None:
    module, room = kernels.module, torch.zeros(1 << 16, dtype=torch.uint8)
    at = room.data_ptr()
    dense = CASES["dense-bf16"](16, 128, 128, "portable").matrix
    whole = [int(dense.kind), 16, 128, 128, 1.0, dense.data.data_ptr(), 4096, 0]
    for entry, arguments in (
        (module.unpack, [*whole, at, 1, 0]),  # there is nothing to unpack
        (module.read_records, [*whole, at, 1]),
        (module.pack_records, [Kind.DENSE_BF16, 16, 128, 128, at, at, at, 4096, 1]),
        (module.pack_records, [Kind.TRIT2, 16, 128, 128, at, at, at, 1087, 1]),
        (module.pack_records, [Kind.TRIT2, 16, 128, 128, 0, at, at, 1088, 1]),
        (module.pack_records, [Kind.TRIT2, 16, 128, 128, at, at, at, 1088, 0]),
        (module.pack_rows, [Kind.TRIT2, 16, 128, 128, at, at, at, at, at, at, 0, 0, 1]),
        (module.pack_rows, [Kind.PARTIAL, 16, 128, 128, at, at, 0, at, at, at, 0, 0, 1]),
        (module.pack_rows, [Kind.PARTIAL, 16, 128, 128, at, at, at, at, 0, at, 0, 0, 1]),
        (module.pack_rows, [Kind.SPARSE8, 16, 128, 128, at, at, 0, 0, 0, at, 0, 0, 1]),
        (module.pack_rows, [Kind.SPARSE_BF16, 16, 128, 64, at, at, 0, 0, 0, at, 0, 0, 1]),
        (module.pack_rows, [Kind.SPARSE_BF16, 16, 128, 128, at, at, 0, 0, 0, at + 4, 0, 0, 1]),
        (module.pack_rows, [Kind.SPARSE_BF16, 16, 128, 128, at, at, 0, 0, 0, at, at, 8, 1]),
        (module.read_memory, [0, 8, 1, 0]),
        (module.read_memory, [at + 2, 8, 1, 0]),
        (module.read_memory, [at, -1, 1, 0]),
        (module.read_memory, [at, 8, 1]),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            entry(*arguments)
    for entry in (module.linear, module.unpack, module.pack_records, module.read_records, module.pack_rows):
        with pytest.raises(ValueError, match="does not fit"):
            entry()


def test_memory_is_read_whole(kernels: Native) -> None:
    """`read_memory` returns the exclusive or of all words, however it is cut."""
    words_ = torch.randint(-(1 << 31), (1 << 31) - 1, (100_003,), dtype=torch.int32, generator=numbers(2, 1, 1))
    want = 0
    for word in words_.tolist():
        want ^= word & (1 << 32) - 1
    for level in kernels.levels:
        for threads in (1, 2, 7):
            found = kernels.module.read_memory(words_.data_ptr(), 4 * len(words_), threads, LEVELS.index(level))
            assert found == want


def test_nothing_is_written_beside_the_output(kernels: Native) -> None:
    for name in CASES:
        matrix = CASES[name](50, 300, 128, LEVELS[kernels.best]).matrix
        for tokens in (1, 3, 5, 13):
            room = torch.full((tokens * 50 + 200,), -7.0)
            call(matrix, torch.randn(tokens, 300), room[100:-100], LEVELS[kernels.best], 2)
            assert bool((room[:100] == -7).all() and (room[-100:] == -7).all())
            assert not bool((room[100:-100] == -7).any())
