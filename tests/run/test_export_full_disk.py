"""A disk that is full in the middle of an export: one line, nothing left, and the same command goes through later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import tiny_models
from foreign import need_package
from integer_models import rounded

from compressor.engine import tensorfile
from compressor.errors import UserError
from compressor.run.export import exporter

resource = pytest.importorskip("resource")

FORMS = ["dense", "compressed-tensors", "gguf", "mlx", "gptq"]
OPTIONS = {"gguf": {"tokenizer": "none"}}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Integers with zero points, about 500 kB. Not to be written to."""
    folder = tmp_path_factory.mktemp("packed")
    source = integer_models.source(folder / "source", vocab_size=512)
    return repacked.repack(
        source, folder / "packed", lambda _, weight: rounded(weight, bits=4, group=32, asymmetric=True)
    )


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Until the end the system lets no file of this process grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def export(form: str, packed: Path, output: Path) -> None:
    exporter(form)(str(packed), output, verify=False, **OPTIONS.get(form, {}))


@pytest.mark.parametrize("form", FORMS)
def test_the_system_refuses_a_write(form: str, packed: Path, tmp_path: Path) -> None:
    """In the middle of the weights, and at their beginning."""
    if form == "gguf":
        need_package("gguf")
    export(form, packed, tmp_path / "whole")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole").iterdir()}
    before = tiny_models.digest(packed)
    for room in (max(sizes.values()) // 2, 100):
        with files_up_to(room), pytest.raises(UserError) as caught:
            export(form, packed, tmp_path / "out")
        words = str(caught.value)
        assert words.startswith(f"{tmp_path / 'out'} was not written: the ") and "\n" not in words
        assert words.endswith("; make room and run the same again")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert tiny_models.digest(packed) == before
    export(form, packed, tmp_path / "out")
    assert tiny_models.digest(tmp_path / "out") == tiny_models.digest(tmp_path / "whole")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gguf"])  # gguf: tests/runtimes/test_gguf_export.py
@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota is used up")]
)
def test_a_disk_that_is_full_when_a_shard_is_to_be_kept(
    form: str, number: int, words: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many file systems say so only then: at the third shard, and where the shards are joined."""
    real: Callable[[int], None] = os.fsync
    for last in (3, 4):
        calls: list[int] = []

        def full(descriptor: int, calls: list[int] = calls, last: int = last) -> None:
            calls.append(descriptor)
            if len(calls) == last:
                raise OSError(number, os.strerror(number))
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(tensorfile.os, "fsync", full)
            with pytest.raises(UserError, match=f"out was not written: {words}; make room"):
                export(form, packed, tmp_path / "out")
        assert len(calls) == last and not list(tmp_path.iterdir())
    export(form, packed, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_is_full_at_the_very_end(
    form: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "gguf":
        need_package("gguf")
    write = Path.write_text

    def full(self: Path, *text: Any, **how: Any) -> int:
        if self.name == "README.md":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, *text, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="out was not written: the disk is full; make room"):
            export(form, packed, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export(form, packed, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()


def test_other_failures_keep_their_own_words(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensorfile.os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        export("dense", packed, tmp_path / "out")
    assert not list(tmp_path.iterdir())
