"""load_evaluation and the warning that a text was seen in calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_texts import sentences, write_texts

from compressor.calibration import load_calibration, load_evaluation, same_text
from compressor.calibration.overlap import GRAM, shared_grams
from compressor.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "held.jsonl", sentences(9, 20))


def test_default_protocol(texts: Path, tokenizer: Any) -> None:
    text = "\n\n".join(sentences(9, 20))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    loaded = load_evaluation(str(texts), tokenizer, seqlen=32)
    count = len(whole) // 32
    assert loaded.ids.tolist() == [whole[32 * i : 32 * i + 32] for i in range(count)]
    assert loaded.n_tokens == 32 * count
    assert loaded.n_bytes == len(tokenizer.decode(whole[: 32 * count]).encode())
    assert loaded.protocol["stride"] == 32 and loaded.protocol["bos"] == "none"
    assert loaded.protocol["tokens_dropped"] == len(whole) - 32 * count
    assert loaded.protocol["documents"] == 20 and loaded.protocol["join"] == "two-newlines"


@pytest.mark.parametrize("join", ["eos", "newline", "space", "none"])
def test_bytes_count_all_text_for_every_join(texts: Path, tokenizer: Any, join: str) -> None:
    separator = {"eos": "", "newline": "\n", "space": " ", "none": ""}[join]
    total = len(separator.join(sentences(9, 20)).encode())
    some = load_evaluation(f"{texts}:join={join}", tokenizer, seqlen=2, stride=1)  # stride 1: nothing is dropped
    assert some.protocol["tokens_dropped"] == 0
    assert some.n_bytes == total and some.n_tokens == some.protocol["tokens_in_text"]
    assert ((some.ids[:, 0] == tokenizer.eos_token_id).sum() == 19) == (join == "eos")


def test_bos_stride_and_window_limit(texts: Path, tokenizer: Any, bare_tokenizer: Any) -> None:
    plain = load_evaluation(f"{texts}", tokenizer, seqlen=15, windows=6)
    with_bos = load_evaluation(f"{texts}", tokenizer, seqlen=16, windows=6, bos=True)
    assert torch.equal(with_bos.ids[:, 1:], plain.ids) and with_bos.n_bytes == plain.n_bytes
    assert bool((with_bos.ids[:, 0] == tokenizer.bos_token_id).all())
    dense = load_evaluation(f"{texts}", tokenizer, seqlen=15, windows=6, stride=5)
    assert torch.equal(dense.ids[:, 5:], torch.cat([dense.ids[1:, :10], dense.ids[-1:, 5:]]))
    assert dense.n_tokens == 15 + 5 * 5
    with pytest.raises(UserError, match="BOS"):
        load_evaluation(str(texts), bare_tokenizer, seqlen=16, bos=True)


def test_wrong_requests(texts: Path, tokenizer: Any) -> None:
    for arguments, match in (
        ({"seqlen": 1}, "--seqlen must be at least 2"),
        ({"seqlen": 8, "windows": 0}, "--windows"),
        ({"seqlen": 8, "stride": 9}, "--stride must be between 1 and 8"),
        ({"seqlen": 100_000}, r"tokens, 100000 are needed for 1 windows.*--seqlen"),
        ({"seqlen": 8, "windows": 100_000}, r"tokens, 800000 are needed.*lower --windows"),
    ):
        with pytest.raises(UserError, match=match):
            load_evaluation(str(texts), tokenizer, **arguments)
    for spec in (f"{texts}@2", f"{texts}:sampling=first"):
        with pytest.raises(UserError, match="takes neither weight"):
            load_evaluation(spec, tokenizer, seqlen=8)
    with pytest.raises(UserError, match="'self' cannot"):
        load_evaluation("self", tokenizer, seqlen=8)


def test_stored_windows_do_not_run_over_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = np.arange(33).reshape(3, 11)
    np.save(tmp_path / "a.npy", rows)
    loaded = load_evaluation(str(tmp_path / "a.npy"), tokenizer, seqlen=5)
    assert loaded.ids.tolist() == [rows[i, j : j + 5].tolist() for i in range(3) for j in (0, 5)]


def test_text_file_is_joined_without_seams(tmp_path: Path, tokenizer: Any) -> None:
    text = "\n".join(sentences(4, 400))
    (tmp_path / "a.txt").write_text(text)
    loaded = load_evaluation(str(tmp_path / "a.txt"), tokenizer, seqlen=8)
    whole = tokenizer(text)["input_ids"]
    assert loaded.ids.flatten().tolist() == whole[: len(whole) // 8 * 8]


def test_named_rule_limits_documents_and_windows(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path / "c.jsonl", sentences(9, 20))
    rule = "evaluation: {join: space, documents: 5, windows: 3}"
    (tmp_path / "set.yaml").write_text(f"name: like-c4\nkind: file\npath: c.jsonl\n{rule}\n")
    loaded = load_evaluation(str(tmp_path / "set.yaml"), tokenizer, seqlen=8)
    whole = tokenizer(" ".join(sentences(9, 5)))["input_ids"]
    assert loaded.ids.flatten().tolist() == whole[:24]
    assert loaded.protocol["documents"] == 5 and loaded.name == "like-c4"
    assert load_evaluation(str(tmp_path / "set.yaml"), tokenizer, seqlen=100).ids.shape == (2, 100)


def test_identical_source_and_overlapping_text(tmp_path: Path, texts: Path, tokenizer: Any) -> None:
    other = write_texts(tmp_path / "other.jsonl", sentences(10, 30))
    mixed = write_texts(tmp_path / "mixed.jsonl", sentences(9, 20) + sentences(11, 1))
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(texts.read_bytes())
    evaluation = load_evaluation(str(texts), tokenizer, seqlen=64)

    def outcome(file: Path, **sizes: int) -> Any:
        numbers = {"nsamples": 8, "seqlen": 64, "seed": 0} | sizes
        return same_text(load_calibration([str(file)], tokenizer, **numbers), evaluation)

    assert not outcome(other) and outcome(other).shared < 0.01
    same = outcome(texts)
    assert same and same.why == "identical source" and same.source == "held.jsonl"
    assert outcome(copied).why == "identical source"
    part = outcome(mixed, nsamples=13)
    assert part and part.why == "overlapping text" and part.shared > 0.2


def test_shared_grams_against_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randint(2, (5, 60), generator=generator)
    asked = torch.cat([torch.randint(2, (4, 60), generator=generator), seen[:2]])

    def grams(ids: torch.Tensor) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + GRAM]) for row in ids.tolist() for i in range(len(row) - GRAM + 1)]

    known = set(grams(seen))
    expected = sum(gram in known for gram in grams(asked)) / len(grams(asked))
    assert shared_grams(seen, asked) == pytest.approx(expected, abs=0)
    assert shared_grams(seen, torch.zeros(3, 5, dtype=torch.int64)) == 0.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="no checkpoints here")
@pytest.mark.slow
def test_published_perplexity_is_reproduced() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models" / "mix14m-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = load_evaluation(str(SHARED / "text" / "heldout" / "stories.jsonl"), tokenizer, seqlen=256, windows=120)
    with torch.no_grad():
        losses = [float(model(input_ids=rows, labels=rows).loss) for rows in loaded.ids.split(20)]
    assert float(np.exp(np.mean(losses))) == pytest.approx(24.8, abs=0.05)
    assert json.dumps(loaded.protocol)
