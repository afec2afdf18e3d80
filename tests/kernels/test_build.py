"""Finding the kernels, compiling them later, and forcing each way to multiply."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.cli.app import main
from compressor.errors import UserError
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.representation import pack
from compressor.formats.trit_planes import TritPlanes
from compressor.kernels import layers
from compressor.kernels import native as search
from compressor.kernels.build import compile_kernels
from compressor.kernels.layers import make_fast
from compressor.kernels.native import LEVELS, RUNGS, Native, native, rung, rung_and_why
from compressor.kernels.sources import OPTIONS, SOURCE, source_digest


@pytest.fixture(autouse=True)
def clean(kernels: Native, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variable of the user's decides, and nothing is left of what a test made the search find."""
    for name in (search.VARIABLE, "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    search.forget()


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Let the search look at these files only."""

    def look(*files: Path) -> None:
        monkeypatch.setattr(search, "candidates", lambda: list(files))
        search.forget()

    yield look
    monkeypatch.undo()
    search.forget()


def program(path: Path, body: str) -> Path:
    """A program in Python that stands for a compiler."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def copier(kernels: Native, tmp_path: Path) -> Path:
    """A compiler that is quick: it copies what was compiled before."""
    body = f"import shutil; shutil.copy({str(kernels.file)!r}, sys.argv[sys.argv.index('-o') + 1])"
    return program(tmp_path / "c++", body)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compressor", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_what_is_built_is_found(
    copier: Path, only: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernels: Native
) -> None:
    file = search.built_file()
    only(file)  # type: ignore[operator]
    assert native() is None and rung() == "torch"
    monkeypatch.setenv("CXX", f"{copier} -pipe")
    assert run(monkeypatch, "kernels", "build") == 0
    said = capsys.readouterr().out.splitlines()
    words = said[0].split()
    assert words[:2] == [str(copier), "-pipe"] and words[-2:] == ["-o", str(file)] and str(SOURCE) in words
    assert set(OPTIONS) < set(words) and not any(word.startswith("-march") for word in words)
    assert said[1].startswith(f"{file}: ") and LEVELS[kernels.best] in said[1]
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    found = native()
    assert found is not None and found.file == file and found.best == kernels.best


@pytest.mark.slow
def test_kernels_are_compiled_on_request(tmp_path: Path) -> None:
    file = tmp_path / f"kernels{search.ABI3}"
    command = compile_kernels(file)
    assert command[-1] == str(file)
    made = search.load(file)
    assert made.module.sources == source_digest() and made.file == file


def test_compilers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out" / f"x{search.ABI3}"
    monkeypatch.setenv("CXX", "/nonexistent/c++ -x")
    with pytest.raises(UserError, match=r"CXX=/nonexistent/c\+\+ -x.*unset CXX"):
        compile_kernels(target)
    broken = program(tmp_path / "broken", "sys.stderr.write('a: note\\nb.hpp:3: error: no such thing\\n'); sys.exit(1)")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match=r"broken failed: b.hpp:3: error: no such thing"):
        compile_kernels(target)
    silent = program(tmp_path / "silent", "sys.exit(3)")
    monkeypatch.setenv("CXX", str(silent))
    with pytest.raises(UserError, match="silent failed: it said nothing"):
        compile_kernels(target)
    assert list(target.parent.iterdir()) == []
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        compile_kernels(target)


def test_without_the_headers_of_python(tmp_path: Path, copier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(copier))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"Python\.h is not in"):
        compile_kernels(tmp_path / f"x{search.ABI3}")


def test_files_that_are_no_kernels_are_passed_over(tmp_path: Path, kernels: Native, only: object) -> None:
    """What is no extension; what was made from other sources; and the good one after them."""
    text, stale, good = (tmp_path / f"{name}{search.ABI3}" for name in ("text", "stale", "good"))
    text.write_bytes(b"no extension")
    whole = kernels.file.read_bytes()
    digest = kernels.module.sources.encode()
    shutil.copy(kernels.file, good)
    if digest == b"unknown":
        pytest.skip("these kernels were compiled by hand")
    assert digest in whole
    stale.write_bytes(whole.replace(digest, b"0" * 16))
    only(tmp_path / "missing", text, stale)  # type: ignore[operator]
    found, wrong = search.search()
    assert found is None and len(wrong) == 2
    assert str(text) in wrong[0] and "made from other sources" in wrong[1]
    assert rung_and_why() == ("torch", "the kernels are not compiled; run `compressor kernels build`")
    only(text, stale, good)  # type: ignore[operator]
    found, wrong = search.search()
    assert found is not None and found.file == good and len(wrong) == 2


def test_installed_kernels_come_before_those_built_later() -> None:
    files = search.candidates()
    assert files[0].parent == SOURCE.parent.parent and files[0].name == f"_native{search.ABI3}"
    assert files[-1] == search.built_folder() / f"{source_digest()}{search.ABI3}"
    assert os.environ["XDG_CACHE_HOME"] in str(files[-1])


@pytest.mark.parametrize("value", ["auto", "", " AUTO ", *RUNGS, "avx1024", "cuda", "0"])
def test_the_variable_forces_a_rung(value: str, kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(search.VARIABLE, value)
    word = value.strip().lower()
    if word in ("", "auto"):
        assert rung() == (LEVELS[kernels.best] if kernels.best else "torch")
    elif word not in RUNGS:
        with pytest.raises(UserError, match=f"COMPRESSOR_KERNELS={word}: expected auto, avx512.*; unset"):
            rung()
    elif word in LEVELS and word not in kernels.levels:
        with pytest.raises(UserError, match=f"this processor has no {word}"):
            rung()
    else:
        assert rung_and_why() == (word, "forced by COMPRESSOR_KERNELS")


def test_rungs_of_lesser_machines(kernels: Native) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lesser_machines(kernels, patch)


def lesser_machines(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    for levels, expected in (
        (("portable",), "torch"), (("portable", "avx2"), "avx2"), (("portable", "avx2", "avx512"), "avx512"),
        (("portable", "neon"), "neon"),
    ):  # fmt: skip
        monkeypatch.setattr(search, "native", lambda levels=levels: replace(kernels, levels=levels))
        assert rung() == expected and LEVELS[replace(kernels, levels=levels).best] == levels[-1]
        for level in LEVELS:
            monkeypatch.setenv(search.VARIABLE, level)
            if level in levels:
                assert rung() == level
            else:
                with pytest.raises(UserError, match=f"no {level}"):
                    rung()
        monkeypatch.delenv(search.VARIABLE)
    monkeypatch.setattr(search, "native", lambda: None)
    assert rung() == "torch"
    for value in RUNGS:
        monkeypatch.setenv(search.VARIABLE, value)
        if value in LEVELS:
            with pytest.raises(UserError, match="not compiled; run `compressor kernels build`"):
                rung()
        else:
            assert rung() == value


@pytest.mark.parametrize("way", RUNGS)
def test_every_rung_multiplies(way: str, kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    if way in LEVELS and way not in kernels.levels:
        pytest.skip(f"this processor has no {way}")
    monkeypatch.setenv(search.VARIABLE, way)
    g = torch.Generator().manual_seed(1)
    trits = torch.randint(-1, 2, (2, 48, 256), generator=g).to(torch.int8)
    scale = torch.rand(2, 48, 2, generator=g).sort(0, descending=True)[0].half()
    code = TritPlanes(trits, scale, 128)
    spec, parts = pack(code, torch.float32)
    x = torch.randn(2, 256, generator=g)
    fast = make_fast(parts, spec, rung(), torch.float32)
    if way == "packed":
        assert fast is None
        return
    assert fast is not None and fast.rung == way and not fast.reason
    want = x.double() @ code.dense(torch.float64).T
    error = float((fast(x, None).double() - want).norm() / want.norm())
    assert error < (1e-6 if way == "dense" else 0.02)
    assert way == "dense" or error > 1e-5  # the others round activations: it is not the dense product in disguise
    if way == "torch":  # slower than the plain matrix for more tokens, which it has beside it
        many = torch.randn(9, 256, generator=g)
        assert torch.equal(fast(many, None), many @ code.dense(torch.float32).T)


@pytest.mark.parametrize("bf16", [True, False])
def test_single_integers_with_exact_activations(bf16: bool, kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are faster than the plain matrix where the processor multiplies bf16, and slower elsewhere."""
    monkeypatch.setattr(layers, "multiplies_bf16", lambda level: bf16)
    monkeypatch.setenv(layers.ACTIVATIONS, "exact")
    g = torch.Generator().manual_seed(1)
    salient = torch.rand(32, 256, generator=g) < 0.1
    signs = (torch.rand(32, 256, generator=g) < 0.5) & ~salient
    codes = torch.randint(0, 256, (32, 256), generator=g, dtype=torch.uint8).masked_fill_(~salient, 0)
    scale, step = torch.rand(32, 2, generator=g).half(), torch.full((32, 1), 0.01).half()
    code = PartialBinary(
        signs, scale, scale / 8, salient, codes, step, torch.full((32,), 128, dtype=torch.uint8), 8, 128
    )
    spec, parts = pack(code, torch.float32)
    best, x = kernels.levels[-1], torch.randn(1, 256, generator=g)
    fast = make_fast(parts, spec, best, torch.float32)
    assert fast is not None and fast.rung == (best if bf16 else "dense")
    assert fast.reason == ("" if bf16 else "single integers with exact activations, without products of bf16")
    want = x.double() @ code.dense(torch.float64).T
    assert float((fast(x, None).double() - want).norm() / want.norm()) < 1e-6
