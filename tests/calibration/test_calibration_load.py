"""load_calibration on local files: what is drawn, mixed and recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from calibration_texts import build_tokenizer, sentences, write_jsonl, write_texts
from safetensors.torch import save_file
from torch import Tensor

from compressor.calibration import TokenWindows, load_calibration
from compressor.errors import UserError


def load(*specs: Path | str, tokenizer: Any, n: int = 8, length: int = 16, seed: int = 0, **more: Any) -> TokenWindows:
    return load_calibration([str(spec) for spec in specs], tokenizer, nsamples=n, seqlen=length, seed=seed, **more)


def inside(text: str, loaded: TokenWindows, tokenizer: Any) -> bool:
    """Whether every window, decoded, is a piece of ``text``."""
    return all(tokenizer.decode(row).strip("\ufffd") in text for row in loaded.ids)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts.jsonl", sentences(1, 30))


def test_shape_hash_and_preview(texts: Path, tokenizer: Any) -> None:
    loaded = load(texts, tokenizer=tokenizer)
    assert loaded.ids.shape == (8, 16) and loaded.ids.dtype == torch.int64
    assert loaded.sha256 == hashlib.sha256(loaded.ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert loaded.preview == tokenizer.convert_ids_to_tokens(loaded.ids[0].tolist())
    assert loaded.origin == (0,) * 8
    (source,) = loaded.sources
    assert source["path"] == str(texts) and source["documents"] > 1 and source["join"] == "eos"
    assert source["file_sha256"] == hashlib.sha256(texts.read_bytes()).hexdigest()


def test_same_seed_same_ids(texts: Path, tokenizer: Any) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load(texts, tokenizer=tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids) and first.sources == again.sources and first.sha256 == again.sha256
    assert not torch.equal(first.ids, other.ids)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_tokenizer_is_not_changed(texts: Path) -> None:
    tokenizer = build_tokenizer()
    # a truncation stored in tokenizer.json is what a call would take away, and what must not cut the text
    tokenizer.backend_tokenizer.enable_truncation(max_length=5)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    before = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.init_kwargs), tokenizer.pad_token
    loaded = load(texts, tokenizer=tokenizer)
    assert (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.init_kwargs), tokenizer.pad_token) == before
    assert torch.equal(loaded.ids, load(texts, tokenizer=build_tokenizer()).ids)


def test_short_documents_are_joined_with_eos(tmp_path: Path, tokenizer: Any) -> None:
    file = write_texts(tmp_path / "short.jsonl", [f"{number} the" for number in range(200)])
    loaded = load(file, tokenizer=tokenizer, n=4, length=32)
    assert bool((loaded.ids == tokenizer.eos_token_id).any(dim=1).all())
    assert not bool((loaded.ids == tokenizer.bos_token_id).any())


def test_join_option(tmp_path: Path, tokenizer: Any, bare_tokenizer: Any) -> None:
    words = sentences(3, 40, words=5)
    file = write_texts(tmp_path / "a.jsonl", words)
    loaded = load(f"{file}:join=space,sampling=first", tokenizer=tokenizer)
    assert loaded.sources[0]["join"] == "space"
    assert tokenizer.decode(loaded.ids.flatten()).rstrip("\ufffd") in " ".join(words)
    assert load(file, tokenizer=bare_tokenizer).sources[0]["join"] == "two-newlines"
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load(f"{file}:join=eos", tokenizer=bare_tokenizer)


def test_text_file_stands_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    text = "\r\n".join(sentences(4, 900))  # more than one piece
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    loaded = load(f"{file}:sampling=windows", tokenizer=tokenizer, n=500)
    assert inside(text, loaded, tokenizer)
    assert loaded.sources[0]["join"] == "none" and loaded.sources[0]["characters"] == len(text)


def test_samplings(texts: Path, tokenizer: Any) -> None:
    for sampling in ("concatenate", "windows", "first", "random-crop"):
        loaded = load(f"{texts}:sampling={sampling}", tokenizer=tokenizer)
        assert loaded.ids.shape == (8, 16) and loaded.sources[0]["sampling"] == sampling
    first = [load(f"{texts}:sampling=first", tokenizer=tokenizer, seed=seed).ids for seed in (0, 1)]
    assert torch.equal(*first)


def test_bos_option(texts: Path, tokenizer: Any, bare_tokenizer: Any) -> None:
    loaded = load(f"{texts}:bos=yes", tokenizer=tokenizer)
    assert loaded.ids.shape == (8, 16) and loaded.sources[0]["bos"] is True
    assert bool((loaded.ids[:, 0] == tokenizer.bos_token_id).all())
    assert not bool((loaded.ids[:, 1:] == tokenizer.bos_token_id).any())
    with pytest.raises(UserError, match="BOS"):
        load(f"{texts}:bos=yes", tokenizer=bare_tokenizer)


def test_overlap_needs_less_text(tmp_path: Path, tokenizer: Any) -> None:
    file = write_texts(tmp_path / "a.jsonl", sentences(5, 1))
    with pytest.raises(UserError, match=r"tokens, 320 are needed.*--nsamples \d+.*--seqlen"):
        load(file, tokenizer=tokenizer, n=20)
    assert load(f"{file}:overlap=yes", tokenizer=tokenizer, n=20).ids.shape == (20, 16)


def test_sources_are_mixed_by_weight(texts: Path, tmp_path: Path, tokenizer: Any) -> None:
    np.save(tmp_path / "sevens.npy", np.full(1000, 7, dtype=np.int32))
    loaded = load(f"{texts}@0.7", f"{tmp_path / 'sevens.npy'}@0.3", tokenizer=tokenizer, n=10)
    assert [source["samples"] for source in loaded.sources] == [7, 3]
    sevens = (loaded.ids == 7).all(dim=1).tolist()
    assert sum(sevens) == 3 and [bool(number) for number in loaded.origin] == sevens
    alone = load(texts, tokenizer=tokenizer, n=7)  # another source does not change what is drawn from the first
    assert {tuple(row) for row in alone.ids.tolist()} == {
        tuple(row) for row, number in zip(loaded.ids.tolist(), loaded.origin, strict=True) if number == 0
    }


def test_parquet_reads_as_jsonl_does(texts: Path, tmp_path: Path, tokenizer: Any) -> None:
    table = pyarrow.table({"number": list(range(30)), "text": sentences(1, 30)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert torch.equal(load(tmp_path / "a.parquet", tokenizer=tokenizer).ids, load(texts, tokenizer=tokenizer).ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">i4"])
def test_numpy_ids(tmp_path: Path, tokenizer: Any, dtype: Any) -> None:
    stream = np.arange(300) % 250
    np.save(tmp_path / "a.npy", stream.astype(dtype))
    loaded = load(tmp_path / "a.npy", tokenizer=tokenizer)
    assert bool(((loaded.ids[:, 1:] - loaded.ids[:, :-1]) % 250 == 1).all())
    np.save(tmp_path / "b.npy", stream[:288].reshape(9, 32).astype(dtype))
    rows = {tuple(row) for row in stream[:288].reshape(18, 16).tolist()}
    loaded = load(tmp_path / "b.npy", tokenizer=tokenizer, n=18)
    assert {tuple(row) for row in loaded.ids.tolist()} == rows


def test_safetensors_ids(tmp_path: Path, tokenizer: Any) -> None:
    ids = torch.arange(160).reshape(10, 16)
    save_file({"input_ids": ids, "other": ids + 1}, tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors", tokenizer=tokenizer, n=10).ids.sort(dim=0).values, ids)
    loaded = load(f"{tmp_path / 'a.safetensors'}:field=other", tokenizer=tokenizer, n=10)
    assert torch.equal(loaded.ids.sort(dim=0).values, ids + 1)


def test_self_source(tokenizer: Any) -> None:
    asked: list[tuple[int, int, int]] = []

    def sampler(count: int, length: int, seed: int) -> Tensor:
        asked.append((count, length, seed))
        return torch.full((count, length), 9, dtype=torch.int32)

    loaded = load("self", tokenizer=tokenizer, sampler=sampler)
    assert loaded.ids.dtype == torch.int64 and loaded.sources[0]["kind"] == "self"
    load("self", tokenizer=tokenizer, sampler=sampler)
    load("self", tokenizer=tokenizer, sampler=sampler, seed=1)
    assert asked[0][:2] == (8, 16) and asked[0] == asked[1] != asked[2]
    with pytest.raises(UserError, match="needs the model"):
        load("self", tokenizer=tokenizer)


def test_chat_messages_go_through_the_template(tmp_path: Path, tokenizer: Any, chat_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "the old house"}]
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns, "id": str(n)} for n in range(20)])
    loaded = load(f"{file}:join=none", tokenizer=chat_tokenizer)
    assert inside("<|user|>the river<|end|><|assistant|>the old house<|end|>" * 20, loaded, chat_tokenizer)
    pairs = [{"prompt": turns[:1], "completion": turns[1:]} for _ in range(20)]
    again = load(f"{write_jsonl(tmp_path / 'b.jsonl', pairs)}:join=none", tokenizer=chat_tokenizer)
    assert torch.equal(again.ids, loaded.ids)
    with pytest.raises(UserError, match=r"line 1: column 'messages' holds chat messages.*no chat template.*:field="):
        load(file, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"content": "no", "text": "yes"}, "yes"),
        ({"content": "yes", "n": 1}, "yes"),
        ({"prompt": "ye", "completion": "s", "n": "x"}, "yes"),
        ({"question": "y", "answer": "s"}, "y\ns"),
        ({"n": 1, "body": "yes"}, "yes"),
    ],
)
def test_the_column_is_picked(tmp_path: Path, tokenizer: Any, row: dict[str, Any], text: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [row] * 400)
    loaded = load(f"{file}:join=space", tokenizer=tokenizer)
    assert inside(f"{text} " * 400, loaded, tokenizer)
