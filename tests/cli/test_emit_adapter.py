"""``compressor decompose --emit-adapter`` as typed: two folders of one run, or a refusal before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import Command
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.run import stream

SHORT = ["--nsamples", "4", "--seqlen", "16", "--no-verify", "--eval", "none"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_models.random_ids(2)).logits


@pytest.mark.parametrize(
    "asked",
    [
        ["-m", "corda", "--components", "smallest", "--rank", "3"],
        ["-m", "welore"],
        ["-m", "svd", "--residual"],
        ["-m", "svd-llm", "--factor-bits", "8", "--rank", "9", "--weighting", "output"],
    ],
    ids=lambda asked: asked[1],
)
def test_both_folders_give_the_same_logits(
    asked: list[str], command: Command, llama: Path, calibration: Path, tmp_path: Path
) -> None:
    out, apart = tmp_path / "out", tmp_path / "apart"
    result = command(
        "decompose", llama, "-o", out, *asked, "--emit-adapter", apart, "--calibration", calibration, *SHORT
    )
    assert result.code == 0 and "low-rank terms" in result.out, result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "out"]
    assert "adapter" not in (out / "recipe.yaml").read_text()
    wanted = logits(AutoModelForCausalLM.from_pretrained(out))
    base = LlamaForCausalLM.from_pretrained(apart)  # the stock class
    together = PeftModel.from_pretrained(base, apart / "adapter")
    torch.testing.assert_close(logits(together), wanted, rtol=1e-4, atol=1e-4)


def test_mistakes_are_one_line_and_come_before_the_run(
    command: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "compress", None)  # would be an error to call
    out, other = tmp_path / "out", ["--emit-adapter", tmp_path / "apart"]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    experts = tiny_models.save(tiny_models.random_model("qwen3_moe"), tmp_path / "moe")
    for model, arguments, word in (
        (llama, ["--emit-adapter", out], "in the way"),
        (llama, ["--emit-adapter", out / "adapter"], "in the way"),
        (llama, ["--emit-adapter", tmp_path], "in the way"),
        (llama, ["--emit-adapter", tmp_path / "out.partial"], "in the way"),
        (llama, ["--emit-adapter", taken], "choose another --emit-adapter"),
        (llama, ["--emit-adapter", taken / "file" / "apart"], "cannot write"),
        (llama, ["--emit-adapter", llama / "apart"], "input folder"),
        (llama, [*other, "--save", "dense"], "dense output"),
        (llama, [*other, "-m", "svd", "--rank", "100"], "none of the 14 matrices smaller"),
        (llama, [*other, "-m", "transact"], "no low-rank terms"),
        (experts, other, "experts"),
        (experts, [*other, "-m", "corda"], "experts"),
    ):
        result = command("decompose", model, "-o", out, *arguments)
        assert result.code == 2 and result.out == "", result
        lines = result.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "taken"]


def test_experts_may_be_left_out(command: Command, calibration: Path, tmp_path: Path) -> None:
    experts = tiny_models.save(tiny_models.random_model("qwen3_moe"), tmp_path / "moe")
    asked = ["-m", "corda", "--exclude", r"\.experts\.", "--emit-adapter", tmp_path / "apart"]
    result = command("decompose", experts, "-o", tmp_path / "out", *asked, "--calibration", calibration, *SHORT)
    assert result.code == 0 and (tmp_path / "apart" / "adapter").is_dir(), result


def test_no_other_command_knows_it(command: Command, llama: Path, tmp_path: Path) -> None:
    result = command("prune", llama, "-o", tmp_path / "out", "--emit-adapter", tmp_path / "apart")
    assert result.code == 2 and "emit-adapter" in result.err
