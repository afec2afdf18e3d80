"""Drawing windows and sharing samples, against what is obviously right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_texts import sentences
from hypothesis import given
from hypothesis import strategies as st

from compressor.calibration import windows as windows_module
from compressor.calibration.tokens import encode
from compressor.calibration.windows import draw_rows, draw_windows, generator_for, random_crops, share_samples
from compressor.errors import UserError


@given(weights=st.lists(st.floats(min_value=0.01, max_value=100), min_size=1, max_size=6), nsamples=st.integers(1, 300))
def test_shares_are_exact_and_near_the_weights(weights: list[float], nsamples: int) -> None:
    try:
        counts = share_samples(weights, nsamples)
    except UserError:
        assert min(weights) / sum(weights) * nsamples < 1
        return
    assert sum(counts) == nsamples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - nsamples * weight / sum(weights)) < 1


def test_shares() -> None:
    assert share_samples([0.7, 0.3], 10) == [7, 3]
    assert share_samples([1, 1, 1], 128) == [43, 43, 42]
    with pytest.raises(UserError, match=r"none of 3 samples.*--nsamples"):
        share_samples([100, 1], 3)


@given(
    tokens=st.integers(1, 200),
    count=st.integers(1, 12),
    length=st.integers(1, 20),
    seed=st.integers(0, 5),
    overlap=st.booleans(),
    in_order=st.booleans(),
)
def test_windows_are_pieces_of_the_stream(
    tokens: int, count: int, length: int, seed: int, overlap: bool, in_order: bool
) -> None:
    stream = torch.arange(tokens) * 3
    needed = length if overlap else count * length
    arguments = (stream, count, length, generator_for(seed, 0))
    if tokens < needed:
        with pytest.raises(UserError, match=f"{tokens} tokens, {needed} are needed"):
            draw_windows(*arguments, what="x", overlap=overlap, in_order=in_order)
        return
    drawn = draw_windows(*arguments, what="x", overlap=overlap, in_order=in_order)
    assert drawn.shape == (count, length)
    assert bool((drawn[:, 1:] - drawn[:, :-1] == 3).all())  # consecutive tokens
    if not overlap:
        assert drawn.unique().numel() == count * length  # no token twice
        if in_order:
            assert torch.equal(drawn.flatten(), stream[: count * length])


def test_windows_start_anywhere() -> None:
    starts = {int(draw_windows(torch.arange(11), 1, 4, generator_for(seed, 0), what="x")[0, 0]) for seed in range(200)}
    assert starts == set(range(8))


def test_the_message_names_the_largest_number_that_works() -> None:
    with pytest.raises(UserError, match="use --nsamples 6, lower --seqlen"):
        draw_windows(torch.arange(100), 7, 16, generator_for(0, 0), what="x")


def test_rows() -> None:
    rows = torch.arange(30).reshape(3, 10)
    drawn = draw_rows(rows, 6, 4, generator_for(0, 0), what="x")
    expected = {tuple(rows[i, j : j + 4].tolist()) for i in range(3) for j in (0, 4)}
    assert {tuple(row) for row in drawn.tolist()} == expected
    with pytest.raises(UserError, match=r"have 10 tokens, 11 are needed.*--seqlen"):
        draw_rows(rows, 1, 11, generator_for(0, 0), what="x")
    with pytest.raises(UserError, match=r"6 windows of 4 tokens, 7 are needed; use --nsamples 6"):
        draw_rows(rows, 7, 4, generator_for(0, 0), what="x")


def test_random_crop_skips_short_documents(tokenizer: Any) -> None:
    long, short = sentences(1, 5, words=60), sentences(2, 5, words=3)
    texts = [text for pair in zip(short, long, strict=True) for text in pair]
    ids, used = random_crops(iter(texts), tokenizer, 4, 30, generator_for(0, 0), what="x")
    assert used == long[:4]
    for row, text in zip(ids.tolist(), used, strict=True):
        whole = encode(tokenizer, [text])[0]
        assert any(whole[i : i + 30] == row for i in range(len(whole)))
    with pytest.raises(UserError, match="only 5 of 10 documents"):
        random_crops(iter(texts), tokenizer, 6, 30, generator_for(0, 0), what="x")


def test_random_crop_does_not_look_for_ever(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Any:
        while True:
            yield "short"

    monkeypatch.setattr(windows_module, "MAX_SKIPPED", 50)
    with pytest.raises(UserError, match=r"only 0 of 50 documents.*concatenate"):
        random_crops(endless(), tokenizer, 1, 30, generator_for(0, 0), what="x")
