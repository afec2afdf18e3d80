"""Perplexity, KL divergence and agreement against slow sums over the stock models' logits."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from compressor.errors import UserError
from compressor.run import judge, measure

WINDOWS = 5


@pytest.fixture(scope="module")
def pruned(llama: Path, calibration: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("pruned") / "out"
    evaluation = {"texts": [str(heldout), str(calibration)], "windows": WINDOWS}
    recipe = tiny_models.recipe_for(calibration, {"method": "sparsegpt", "sparsity": 0.5}, evaluation=evaluation)
    return output, tiny_models.run_recipe(recipe, llama, output)


def window_ids(text: Path) -> Tensor:
    """The first windows of a text, cut by hand."""
    ids = tiny_models.tokenizer()(text.read_text(encoding="utf-8"))["input_ids"]
    assert ids[0] != 0  # no BOS
    return torch.tensor(ids[: WINDOWS * tiny_models.LENGTH]).view(WINDOWS, tiny_models.LENGTH)


def slowly(dense: Path, other: Path, ids: Tensor) -> dict[str, float]:
    """Token by token, in fp64, from the stock models."""
    reference, logits = (tiny_models.stock_logits(folder, ids).double() for folder in (dense, other))
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for window in range(len(ids)):
        for place in range(ids.shape[1] - 1):
            p = reference[window, place].softmax(-1)
            q = logits[window, place].softmax(-1)
            nll -= math.log(float(q[ids[window, place + 1]]))
            kl += float((p * (p.log() - q.log())).sum())
            agree += int(p.argmax() == q.argmax())
            count += 1
    return {"perplexity": math.exp(nll / count), "kl": kl / count, "top1": agree / count}


def test_the_report_has_what_the_stock_models_give(llama: Path, heldout: Path, calibration: Path, pruned: Any) -> None:
    output, report = pruned
    for evaluation, text in zip(report.evaluation, (heldout, calibration), strict=True):
        ids = window_ids(text)
        rows = {row.who: row for row in evaluation.rows}
        assert evaluation.windows == WINDOWS and evaluation.tokens == WINDOWS * (tiny_models.LENGTH - 1)
        expected = slowly(llama, output, ids)
        assert rows["compressed"].perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
        assert rows["compressed"].kl == pytest.approx(expected["kl"], rel=1e-4)
        assert rows["compressed"].top1 == pytest.approx(expected["top1"], abs=1e-9)
        assert rows["dense"].perplexity == pytest.approx(slowly(llama, llama, ids)["perplexity"], rel=1e-5)
        assert rows["dense"].kl is None
        assert rows["baseline"].kl is not None and rows["baseline"].kl > 0


def test_the_baseline_is_plain_rounding_of_as_many_bytes(pruned: Any) -> None:
    _, report = pruned
    baseline = report.baseline
    assert baseline is not None
    assert baseline.bytes <= report.size.output_bytes
    assert "round-to-nearest" in baseline.label
    assert baseline.bits_per_weight <= report.size.bits_per_weight_linears


def test_text_that_was_calibrated_on_is_marked(calibration: Path, pruned: Any) -> None:
    _, report = pruned
    assert [evaluation.in_domain for evaluation in report.evaluation] == [False, True]
    assert sum("flatters" in line and calibration.stem in line for line in report.warnings) == 1


def test_evaluate_alone_agrees_with_the_report(llama: Path, heldout: Path, pruned: Any) -> None:
    output, report = pruned
    (result,) = judge.judge_model(
        str(output), against=str(llama), texts=[str(heldout)], windows=WINDOWS, seqlen=tiny_models.LENGTH
    )
    expected = {row.who: row for row in report.evaluation[0].rows}
    assert result["protocol"] == report.evaluation[0].protocol
    for row in result["rows"]:
        assert row["perplexity"] == pytest.approx(expected[row["who"]].perplexity, rel=1e-6)
        assert row["kl"] == (None if row["who"] == "dense" else pytest.approx(expected[row["who"]].kl, rel=1e-5))
    (alone,) = judge.judge_model(str(output), texts=[str(heldout)], windows=WINDOWS, seqlen=tiny_models.LENGTH)
    assert [row["kl"] for row in alone["rows"]] == [None]


def test_a_model_against_itself_is_no_distance_away(llama: Path, heldout: Path) -> None:
    (result,) = judge.judge_model(str(llama), against=str(llama), texts=[str(heldout)], windows=2, seqlen=16)
    assert [row["kl"] for row in result["rows"]][1] == pytest.approx(0, abs=1e-9)
    assert result["rows"][1]["top1"] == 1.0


def test_a_divergence_is_never_below_zero() -> None:
    """In fp32 the sum of one that is zero comes out on either side, and a negative one would be no divergence."""
    logits = torch.randn(1, 40, 500, generator=torch.Generator().manual_seed(3))
    reference = logits.log_softmax(-1)
    text = SimpleNamespace(n_tokens=41, n_bytes=100)
    found = []
    for shift in range(20):  # the same distribution: only the rounding differs
        logp = (logits + shift).log_softmax(-1)
        tally = measure.Tally()
        measure._count(tally, logp, logp.argmax(-1), reference, "a model")
        found.append(sum(tally.kl))
        assert 0 <= tally.row("compressed", "a model", text, compared=True)["kl"] < 1e-6  # type: ignore[arg-type]
    assert min(found) < 0


def test_models_that_cannot_be_compared(llama: Path, heldout: Path, tmp_path: Path) -> None:
    other = tiny_models.save(tiny_models.random_model("llama", vocab_size=300), tmp_path / "other")
    with pytest.raises(UserError, match="different vocabularies"):
        judge.judge_model(str(llama), against=str(other), texts=[str(heldout)], seqlen=16)
    for words, options in (
        ("unknown dtype", {"dtype": "int4"}),
        ("device", {"device": "abacus"}),
        ("context of 64", {"seqlen": 65}),
        ("embedded-heldout|no calibration set", {"texts": ["embeded-heldout"]}),
    ):
        with pytest.raises(UserError, match=words):
            judge.judge_model(str(llama), **{"texts": [str(heldout)], "seqlen": 16, **options})


def test_logits_that_are_not_finite_are_no_result(heldout: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    source = tiny_models.save(model, tmp_path / "model")
    with pytest.raises(UserError, match="NaN or infinite"):
        judge.judge_model(str(source), texts=[str(heldout)], windows=1, seqlen=16)


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        (("embedded",), "embedded-heldout"),
        (("c4",), "wikitext2-test"),
        (("wikitext2:join=eos@0.5", "notes.txt"), "c4-validation"),
        (("ultrachat",), "wikitext2-test"),
        (("notes.txt",), "embedded-heldout"),
        (("self",), "embedded-heldout"),
    ],
)
def test_the_default_text_is_another_than_the_calibration_text(sources: tuple[str, ...], text: str) -> None:
    assert measure.default_texts(sources) == (text,)
