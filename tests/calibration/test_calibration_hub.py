"""Sets on the hub, with the hub replaced by a list of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from calibration_texts import sentences

from compressor.calibration import load_calibration, load_evaluation, named_set
from compressor.errors import UserError

ROWS = [row for text in sentences(6, 40) for row in ("", f" = {text[:9]} = \n", text + " \n")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, **arguments: Any) -> list[dict[str, str]]:
        calls.append({"path": path} | arguments)
        return [{"text": row} for row in ROWS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    return calls


def test_wikitext_protocol_keeps_empty_rows(asked: list[dict[str, Any]], tokenizer: Any) -> None:
    whole = tokenizer("\n\n".join(ROWS))["input_ids"]
    loaded = load_evaluation("wikitext2-test", tokenizer, seqlen=16)
    assert loaded.ids.flatten().tolist() == whole[: len(whole) // 16 * 16]
    assert loaded.path == f"Salesforce/wikitext@{named_set('wikitext2-test').revision}"
    assert asked == [
        {
            "path": "Salesforce/wikitext",
            "name": "wikitext-2-raw-v1",
            "split": "test",
            "data_files": None,
            "revision": named_set("wikitext2-test").revision,
            "streaming": True,
        }
    ]


def test_what_is_recorded(asked: list[dict[str, Any]], tokenizer: Any) -> None:
    loaded = load_calibration(["c4"], tokenizer, nsamples=4, seqlen=16, seed=0)
    (source,) = loaded.sources
    assert asked[0]["data_files"] == {"train": ["en/c4-train.00000-of-01024.json.gz"]}
    assert source["hub"] == "allenai/c4" and source["pinned"] is True and source["sampling"] == "random-crop"
    assert source["documents"] == 4 and "path" not in source


def test_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch, asked: list[Any], tokenizer: Any) -> None:
    read = 0

    def endless(path: str, **arguments: Any) -> Iterator[dict[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield {"text": f"the river {read}"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    loaded = load_calibration(["pile-10k"], tokenizer, nsamples=4, seqlen=16, seed=0)
    assert loaded.ids.shape == (4, 16) and read == 20_000
    assert not torch.equal(loaded.ids, load_calibration(["pile-10k"], tokenizer, nsamples=4, seqlen=16, seed=1).ids)


def test_a_connection_that_breaks(monkeypatch: pytest.MonkeyPatch, asked: list[Any], tokenizer: Any) -> None:
    def broken(path: str, **arguments: Any) -> Iterator[dict[str, str]]:
        yield {"text": "the river"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError, match=r"'pile-10k' could not be read from the hub .*connection reset.*FILE"):
        load_calibration(["pile-10k"], tokenizer, nsamples=4, seqlen=16, seed=0)
