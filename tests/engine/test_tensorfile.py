"""Reading and writing safetensors files, held against the safetensors library; and files that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.engine.tensorfile import DTYPES, header_bytes, layout_of, read_header, read_tensor, write_file
from compressor.errors import UserError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES),
    min_size=1,
    max_size=5,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(layout))
    out = {}
    for name, (dtype, shape) in layout.items():
        high = 2 if dtype == torch.bool else 120
        size = int(torch.tensor(shape).prod()) * dtype.itemsize
        data = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
        out[name] = data.view(dtype).reshape(shape)
    return out


def same(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t.reshape(-1) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@QUICK
@given(TENSORS)
def test_what_we_write_the_library_reads(tmp_path: Path, layout: Any) -> None:
    tensors, file = filled(layout), tmp_path / "ours.safetensors"
    size = write_file(file, layout_of(tensors.items()), tensors.__getitem__)
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert size == file.stat().st_size
    with safe_open(file, framework="pt") as content:
        assert content.metadata() == {"format": "pt"}


@QUICK
@given(TENSORS)
def test_what_the_library_writes_we_read(tmp_path: Path, layout: Any) -> None:
    tensors, file = filled(layout), tmp_path / "theirs.safetensors"
    save_file(tensors, file, metadata={"who": "them"})
    entries = read_header(file)
    assert entries.keys() == tensors.keys()
    assert all(same(read_tensor(entry), tensors[name]) for name, entry in entries.items())


def test_files_are_canonical_and_aligned(tmp_path: Path) -> None:
    tensors = filled({"b": (torch.uint8, (3,)), "c": (torch.float32, (5,)), "a": (torch.bfloat16, (1, 3))})
    for number, names in enumerate(("abc", "cba")):
        chosen = {name: tensors[name] for name in names}
        write_file(tmp_path / str(number), layout_of(chosen.items()), chosen.__getitem__)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in read_header(tmp_path / "0").values())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0", "1"]  # nothing temporary stays


def test_a_tensor_that_is_not_what_the_layout_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        write_file(tmp_path / "x", {"a": (torch.float32, (2,))}, lambda _: torch.zeros(3))
    assert not (tmp_path / "x").exists()


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}}  # fmt: skip  # noqa: E501


def raw(header: Any, data: bytes = b"\0" * 12, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(name: str, **facts: Any) -> Any:
    return {**GOOD, name: {**GOOD[name], **facts}}


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "shorter than its first number": b"\x08\0\0",
    "data cut off": raw(GOOD, b"\0" * 11),
    "data too long": raw(GOOD, b"\0" * 13),
    "header longer than the file": raw(GOOD, length=1 << 20),
    "header absurdly long": raw(GOOD, length=1 << 62),
    "header cut off": raw(GOOD, length=20),
    "no JSON": raw(b"{nonsense}"),
    "not UTF-8": raw(b"\xff\xfe{}"),
    "a list": raw([1, 2]),
    "nested without end": raw(b"[" * 200_000),
    "a number without end": raw(b'{"a":' + b"9" * 10_000 + b"}"),
    "entry without dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "entry that is a string": raw({"a": "x"}),
    "unknown dtype": raw(changed("a", dtype="F33")),
    "dtype that is a list": raw(changed("a", dtype=["F32"])),
    "shape that needs more bytes": raw(changed("a", shape=[3])),
    "negative side": raw(changed("a", shape=[-2])),
    "side that is a fraction": raw(changed("a", shape=[2.5])),
    "side that is infinite": raw(b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,12]}}'),
    "shape that is a number": raw(changed("a", shape=2)),
    "negative offset": raw(changed("a", data_offsets=[-8, 0])),
    "offsets the wrong way round": raw(changed("a", data_offsets=[8, 0])),
    "offsets behind the end": raw(changed("b", data_offsets=[20, 24])),
    "three offsets": raw(changed("a", data_offsets=[0, 4, 8])),
    "tensors that overlap": raw(changed("b", data_offsets=[4, 8]), b"\0" * 8),
    "a hole between tensors": raw(changed("b", data_offsets=[10, 14]), b"\0" * 14),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises((SafetensorError, ValueError, OSError)):  # a fair reference: they refuse it too
        load_file(file)
    with pytest.raises(UserError, match=r"broken\.safetensors") as caught:
        read_header(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@QUICK
@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_make_it_crash(tmp_path: Path, junk: bytes, place: int) -> None:
    content = raw(GOOD)
    for damaged in (junk, content[:place], content[:place] + junk + content[place + len(junk) :]):
        file = tmp_path / "fuzz.safetensors"
        file.write_bytes(damaged)
        try:
            for entry in read_header(file).values():
                read_tensor(entry)
        except UserError:
            pass


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw(GOOD))
    entry = read_header(file)["b"]
    file.write_bytes(raw(GOOD)[:-2])
    with pytest.raises(UserError, match="ended inside tensor 'b'"):
        read_tensor(entry)


def test_the_header_is_padded_to_eight_bytes() -> None:
    write: Callable[[str], bytes] = lambda name: header_bytes({name: (torch.uint8, (1,))})  # noqa: E731
    assert all(len(write("x" * n)) % 8 == 0 for n in range(1, 20))
