"""Every wrong file is refused with one line that names it and says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_texts import TEMPLATE, build_tokenizer, sentences, write_jsonl, write_texts
from safetensors.torch import save_file

from compressor.calibration import load_calibration, load_evaluation
from compressor.errors import UserError


def refuse(spec: Path | str, tokenizer: Any, match: str, **sizes: int) -> None:
    numbers = {"nsamples": 4, "seqlen": 8, "seed": 0} | sizes
    with pytest.raises(UserError, match=match) as caught:
        load_calibration([str(spec)], tokenizer, **numbers)
    assert "\n" not in str(caught.value)


def test_numbers(tokenizer: Any) -> None:
    refuse("c4", tokenizer, "--nsamples must be at least 1", nsamples=0)
    refuse("c4", tokenizer, "--seqlen must be at least 1", seqlen=-1)
    with pytest.raises(UserError, match="no calibration source"):
        load_calibration([], tokenizer, nsamples=1, seqlen=8, seed=0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_text(tmp_path: Path, tokenizer: Any, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    refuse(tmp_path / name, tokenizer, "holds no text.*--calibration")
    with pytest.raises(UserError, match=r"holds no text.*--text"):
        load_evaluation(str(tmp_path / name), tokenizer, seqlen=8)


def test_empty_documents_only(tmp_path: Path, tokenizer: Any) -> None:
    refuse(write_texts(tmp_path / "a.jsonl", ["", "  "]), tokenizer, "holds no text")


def test_too_short(tmp_path: Path, tokenizer: Any) -> None:
    file = write_texts(tmp_path / "a.jsonl", ["the river"])
    tokens = len(tokenizer("the river")["input_ids"])
    refuse(file, tokenizer, rf"{tokens} tokens, 32 are needed for 4 x 8; .*--nsamples.*--seqlen")


def test_unknown_column(tmp_path: Path, tokenizer: Any) -> None:
    file = write_texts(tmp_path / "a.jsonl", sentences(0, 3))
    refuse(f"{file}:field=txt", tokenizer, r"line 1: no column 'txt' \(did you mean 'text'\?\); .*:field=NAME")
    two = write_jsonl(tmp_path / "b.jsonl", [{"a": "x", "b": "y"}])
    refuse(two, tokenizer, r"cannot tell which column is the text \(columns: a, b\); add :field=NAME")
    late = write_jsonl(tmp_path / "c.jsonl", [{"text": "x"}, {"other": "y"}])
    refuse(late, tokenizer, "line 2: the column 'text' is missing")
    number = write_jsonl(tmp_path / "d.jsonl", [{"text": 3}])
    refuse(number, tokenizer, "column 'text' holds int, expected text or chat messages")


def test_invalid_json_names_the_line(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n\n{"text": "y"\n')
    refuse(file, tokenizer, r"a\.jsonl, line 3: invalid JSON")
    file.write_text('{"text": "x"}\n["y"]\n')
    refuse(file, tokenizer, "line 2: expected a JSON object, found list")
    file.write_text('{"text": "x\\ud800"}\n')
    refuse(file, tokenizer, "line 1: holds text that is not valid Unicode")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    refuse(tmp_path / name, tokenizer, "is not UTF-8 text")


@pytest.mark.parametrize("name", ["a.parquet", "a.npy", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not such a file at all"])
def test_corrupt_binary_files(tmp_path: Path, tokenizer: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, tokenizer, "is not a readable")


def test_pickled_numpy_is_not_opened(tmp_path: Path, tokenizer: Any) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refuse(tmp_path / "a.npy", tokenizer, "is not a readable .npy file")


def test_wrong_arrays(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.npy"
    for array, match in (
        (np.zeros(100), "holds float64, expected whole-number"),
        (np.zeros((2, 3, 4), dtype=np.int32), r"shape \[2, 3, 4\]"),
        (np.zeros(0, dtype=np.int32), "is empty"),
        (np.array([1, 2, -3] * 20), r"token id -3 at \[2\] is outside the tokenizer's vocabulary of \d+"),
        (np.array([[1, 2, 99999, 4] * 2] * 20), r"token id 99999 at \[0, 2\]"),
    ):
        np.save(file, array)
        refuse(file, tokenizer, match)
        with pytest.raises(UserError, match=match):
            load_evaluation(str(file), tokenizer, seqlen=4)
    save_file({"a": torch.zeros(9), "b": torch.zeros(9)}, tmp_path / "a.safetensors")
    refuse(tmp_path / "a.safetensors", tokenizer, r"cannot tell which tensor holds the ids \(a, b\)")
    refuse(f"{tmp_path / 'a.safetensors'}:field=c", tokenizer, "no tensor 'c'")
    refuse(f"{tmp_path / 'a.safetensors'}:field=a", tokenizer, "expected whole-number token ids")


def test_bad_messages(tmp_path: Path, chat_tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"from": "human", "value": "x"}]}])
    refuse(file, chat_tokenizer, "line 1: a message of 'messages' has no 'role' and 'content'")
    strict = build_tokenizer(template="{{ raise_exception('roles must alternate') }}" + TEMPLATE)
    file = write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    refuse(file, strict, r"line 1: the tokenizer's chat template refuses 'messages' \(roles must alternate\)")


def test_no_hub_is_said_at_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    match = "set '{}' could not be read from the hub .*offline.*--calibration FILE"
    refuse("wikitext2", tokenizer, match.format("wikitext2"))
    with pytest.raises(UserError, match=match.format("c4-validation")):
        load_evaluation("c4-validation", tokenizer, seqlen=8)
    with pytest.raises(UserError, match="calibration set without an evaluation protocol"):
        load_evaluation("c4", tokenizer, seqlen=8)
