"""What kernels cost, measured by the process that reloads a result; and that its check of exactness is without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compressor.kernels.native import LEVELS, VARIABLE, native, rung, using
from compressor.kernels.stock import FEW_IN_8_BITS, has_int8
from compressor.report.schema import Verification
from compressor.run import verify
from compressor.run.kernel_cost import FEWEST, LOGITS, MOST, WINDOWS, WORK, chosen_windows, compared, kernel_cost

TRITS = {"quantize": {"method": "trit-planes", "planes": 2, "group": 32}}
needs_kernels = pytest.mark.skipif(native() is None, reason="the kernels are not compiled")


@given(st.integers(1, 40), st.integers(2, 3000), st.integers(2, 300_000), st.integers(1, 10**12))
def test_chosen_windows_are_few(windows: int, length: int, vocabulary: int, parameters: int) -> None:
    ids = torch.arange(windows * length).view(windows, length)
    chosen = chosen_windows(ids, vocabulary, parameters)
    count, tokens = chosen.shape
    assert torch.equal(chosen, ids[:count, :tokens]) and count == min(windows, WINDOWS) and tokens >= min(length, 16)
    assert count * tokens <= max(FEWEST, MOST)
    assert count * tokens <= FEWEST or (count * tokens * vocabulary <= LOGITS and count * tokens * parameters <= WORK)


def test_compared_is_what_it_says() -> None:
    """Against sums over every token, one by one."""
    generator = torch.Generator().manual_seed(3)
    before, after = (torch.randn(3, 7, 11, generator=generator) for _ in range(2))
    ids = torch.randint(0, 11, (3, 7), generator=generator)
    nll, kl, same = [0.0, 0.0], 0.0, 0
    for window in range(3):
        for place in range(6):
            p, q = (each[window, place].double().softmax(0) for each in (before, after))
            target = int(ids[window, place + 1])
            nll[0] -= math.log(float(p[target]))
            nll[1] -= math.log(float(q[target]))
            kl += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
            same += int(p.argmax()) == int(q.argmax())
    found = compared(before, after, ids)
    want = {"exact_perplexity": math.exp(nll[0] / 18), "perplexity": math.exp(nll[1] / 18), "kl": kl / 18}
    assert found == pytest.approx({**want, "top1": same / 18})


@pytest.fixture(scope="module")
def packed(llama: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cost") / "packed"
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, TRITS), llama, output)
    return output


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_numbers_are_those_of_two_loads(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "portable")
    ids = tiny_models.random_ids(3)
    with using("packed"), torch.no_grad():
        exact = load(packed)(input_ids=ids).logits
        model = load(packed)
    with torch.no_grad():
        fast = load(packed)(input_ids=ids).logits
    assert not torch.equal(exact, fast)
    found = kernel_cost(model, ids)
    assert found["rung"] == "portable" and found["activations"] == "int8" and found["layers"] == {"portable": 14}
    names = ("exact_perplexity", "prompt_perplexity", "prompt_kl", "prompt_top1")
    assert [found[name] for name in names] == list(compared(exact, fast, ids).values())
    assert found["perplexity"] != found["exact_perplexity"] and found["kl"] < 2 * found["prompt_kl"]
    assert found["kl"] > 0 and (found["windows"], found["seqlen"]) == tuple(ids.shape) and found["seconds"] > 0
    monkeypatch.setenv("COMPRESSOR_ACTIVATIONS", "exact")
    with using("packed"):
        model = load(packed)
    exactly = kernel_cost(model, ids)
    assert exactly["activations"] == "exact" and exactly["kl"] < found["kl"] / 10


def test_why_nothing_was_measured(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny_models.random_ids(1)
    for value, words in (("packed", "by packed, forced by"), ("dense", "by dense"), ("avx3", "expected auto")):
        monkeypatch.setenv(VARIABLE, value)
        assert words in kernel_cost(None, ids)["skipped"]
    if native() is not None:
        monkeypatch.setenv(VARIABLE, "portable")
        assert "none is packed" in kernel_cost(tiny_models.random_model("llama"), ids)["skipped"]


@pytest.mark.skipif(not has_int8(), reason="PyTorch's int8 product is not here, or slow on this processor")
@pytest.mark.usefixtures("by_the_package")
def test_without_kernels_rounding_is_measured_too(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few windows that each token is rounded as one alone is; in prompts nothing is."""
    monkeypatch.setenv(VARIABLE, "torch")
    with using("packed"):
        model = load(packed)
    found = kernel_cost(model, tiny_models.random_ids(WINDOWS))
    assert (found["rung"], found["layers"], found["windows"]) == ("torch", {"torch": 14}, FEW_IN_8_BITS)
    assert found["prompt_kl"] < 1e-9 < 1e-7 < found["kl"] < 1e-2


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_kernels_that_give_way_in_prompts_are_measured_all_the_same(
    llama: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single integers among signs: many tokens are multiplied with the matrix itself, few are rounded."""
    stage = {"quantize": {"method": "pb-llm", "group": "row", "salient": 0.2}}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), llama, tmp_path / "out")
    monkeypatch.setenv(VARIABLE, "portable")
    with using("packed"):
        model = load(tmp_path / "out")
    found = kernel_cost(model, tiny_models.random_ids(WINDOWS))
    assert found["layers"] == {"portable": 14} and found["prompt_kl"] < 1e-9 < 1e-7 < found["kl"]


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_factors_that_are_mapped_from_a_file(
    llama: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie at any address; the kernels want multiples of 64."""
    stage = {"decompose": {"method": "svd", "rank": 7}}
    tiny_models.run_recipe(tiny_models.recipe_for(None, stage), llama, tmp_path / "out")
    monkeypatch.setenv(VARIABLE, "portable")
    with using("packed"):
        model = load(tmp_path / "out")
    found = kernel_cost(model, tiny_models.random_ids(WINDOWS))
    assert found["layers"] == {"portable": 14} and found["kl"] < 1e-3


def test_a_failure_there_is_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "kernel_cost", None)
    assert verify._cost(None, torch.zeros(1, 1))["skipped"].startswith("TypeError: ")


@needs_kernels
@pytest.mark.usefixtures("by_the_package")
def test_loads_that_ask_for_packed_use_no_kernels(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "portable")
    with using("packed"):
        assert rung() == "packed"
        exact = load(packed)
    assert rung() == "portable"
    ways = [[m.fast for m in model.modules() if hasattr(m, "fast")] for model in (exact, load(packed))]
    assert set(ways[0]) == {None} and None not in ways[1]
    assert len(ways[0]) == len(ways[1]) == 14


def verified(model: Path, output: Path, stage: dict[str, Any], calibration: Path, heldout: Path) -> Verification:
    evaluation = {"texts": [str(heldout)], "windows": 3, "seqlen": tiny_models.LENGTH, "baseline": False}
    recipe = tiny_models.recipe_for(calibration, stage, verify=True, evaluation=evaluation)
    found = tiny_models.run_recipe(recipe, model, output).verification
    assert found is not None
    return found


def test_a_run_measures_the_kernels_and_checks_without_them(
    llama: Path, calibration: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels on by default the check of exactness is the same to the bit, and the cost is beside it."""
    monkeypatch.setenv(VARIABLE, "packed")
    without = verified(llama, tmp_path / "without", TRITS, calibration, heldout)
    assert without.kernels is None and "forced by COMPRESSOR_KERNELS" in (without.kernels_skipped or "")
    if native() is None:
        return
    monkeypatch.setenv(VARIABLE, "portable")
    found = verified(llama, tmp_path / "found", TRITS, calibration, heldout)
    assert found.max_abs_difference == without.max_abs_difference
    assert found.kernels is not None and found.kernels_skipped is None
    assert found.kernels.rung in LEVELS and found.kernels.kl > 0 and found.kernels.text == heldout.name
    assert (found.kernels.windows, found.kernels.seqlen) == (3, tiny_models.LENGTH)
    stock = verified(llama, tmp_path / "stock", {"quantize": {"method": "rtn", "group": 16}}, calibration, heldout)
    assert stock.kernels is None and stock.kernels_skipped is None  # read without us
