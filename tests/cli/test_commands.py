"""The verbs as a person types them: help, JSON, silence, and strange names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import Command

import compressor
from compressor.methods.quantize_settings import QUANTIZE_METHODS
from compressor.methods.settings import PRUNE_METHODS
from compressor.report.files import read_report

VERBS = ["prune", "run", "plan", "evaluate", "compare", "explain", "generate", "bench"]
SHORT = ["--nsamples", "4", "--seqlen", "16", "--no-verify", "--eval-windows", "2"]


@pytest.fixture
def options(calibration: Path, heldout: Path) -> list[Any]:
    return ["--calibration", calibration, "--eval", heldout, *SHORT]


def test_partial_binarization_from_end_to_end(
    command: Command, llama: Path, options: list[Any], tmp_path: Path
) -> None:
    """Words that the parser makes numbers of, the second name of a flag, and what the report says of it."""
    output = tmp_path / "out"
    asked = ["--salient", "0.14", "--salient-bits", "4", "--metric", "hessian", "--group", "16", "--qat-steps", "4"]
    result = command("quantize", llama, "-o", output, "--method", "pb-llm", *asked, *options, "--verify")
    assert result.code == 0, result.err
    report = read_report(output)
    stage = report.recipe["stages"][0]["quantize"]
    assert (stage["salient"], stage["salient_bits"], stage["tune_steps"]) == (0.14, 4, 4)
    assert {layer.format for layer in report.layers} == {"partial-binary"}
    assert report.verification is not None and report.verification.passed
    for flag, value in (("--salient", "1"), ("--salient-bits", "3"), ("--mask", "rows"), ("--fit", "data-free")):
        refused = command("quantize", llama, "-o", tmp_path / "no", "--method", "pb-llm", flag, value, *options)
        assert refused.code == 2 and "Traceback" not in refused.err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str, command: Command) -> None:
    for flag in ("--help", "-h"):
        result = command(*([verb] if verb else []), flag)
        assert result.code == 0 and result.err == ""
        assert all(word in result.out for word in ([*VERBS, "--version"] if not verb else ["Usage", "--help"]))


def test_help_of_prune_names_every_setting(command: Command) -> None:
    text = command("prune", "--help").out
    for cls in PRUNE_METHODS.values():
        for name in cls.model_fields:
            assert f"--{name.replace('_', '-')}" in text
    for flag in ("--calibration", "--nsamples", "--seqlen", "--seed", "--dtype", "--device", "--save", "--dry-run"):
        assert flag in text


def test_help_of_quantize_names_every_setting(command: Command) -> None:
    text = command("quantize", "--help").out
    for cls in QUANTIZE_METHODS.values():
        for name in cls.model_fields:
            assert f"--{name.replace('_', '-')}" in text
    assert "--qat-steps" in text


def test_version_and_no_verb(command: Command) -> None:
    assert command("--version").out == f"compressor {compressor.__version__}\n"
    assert "Usage" in command().out


def test_prune_from_end_to_end(command: Command, llama: Path, options: list[Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = command("prune", llama, "-o", output, *options)
    assert result.code == 0, result.err
    assert result.err == ""  # no terminal, no progress
    assert str(output) in result.out.replace("\n", "")
    report = read_report(output)
    assert report.tool.command.startswith("compressor prune ")
    assert {path.name for path in output.iterdir()} >= {"model.safetensors", "config.json", "report.html", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = command("prune", llama, "-o", output, "--overwrite", *options)
    assert again.code == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]
    explained = command("explain", output, "--json")
    assert explained.code == 0 and json.loads(explained.out)
    compared = command("compare", output, output, "--json")
    assert compared.code == 0 and len(json.loads(compared.out)["models"]) == 2


def test_json_is_alone_on_standard_output(
    command: Command, llama: Path, options: list[Any], heldout: Path, tmp_path: Path
) -> None:
    pruned = command("prune", llama, "-o", tmp_path / "out", "--json", "-v", *options)
    assert json.loads(pruned.out)["schema_version"] == 1
    assert "first calibration window" in pruned.err
    plan = json.loads(command("prune", llama, "--dry-run", "--json", *options).out)
    assert plan["blocks"] == 2 and plan["violations"] == []
    assert plan["output_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    arguments = [
        "evaluate",
        tmp_path / "out",
        "--against",
        llama,
        "--text",
        heldout,
        "--seqlen",
        "16",
        "--windows",
        "2",
    ]
    (evaluated,) = json.loads(command(*arguments, "--json").out)
    assert [row["who"] for row in evaluated["rows"]] == ["dense", "compressed"]
    table = command(*arguments)
    assert table.code == 0 and "perplexity" in table.out and table.err == ""


def test_infinite_perplexity_is_still_json(command: Command, heldout: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", scale=60.0)
    source = tiny_models.save(model, tmp_path / "model")
    arguments = ["evaluate", source, "--text", heldout, "--seqlen", "16", "--windows", "2"]
    result = command(*arguments, "--json")
    assert result.code == 0, result.err
    json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert command(*arguments).code == 0


def test_quiet_says_nothing(command: Command, llama: Path, options: list[Any], tmp_path: Path) -> None:
    result = command("prune", llama, "-o", tmp_path / "out", "--quiet", *options)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_plan_reads_no_weights_and_writes_nothing(
    command: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        pytest.fail("a plan reads no weights")

    monkeypatch.setattr("compressor.engine.checkpoint.read_tensor", read)
    monkeypatch.chdir(tmp_path)
    for arguments in (["plan", "sparsegpt-50", "--model", llama], ["prune", llama, "--dry-run"]):
        result = command(*arguments)
        assert result.code in (0, 2) and "stage 1" in result.out
    assert not list(tmp_path.iterdir())


def test_a_plan_that_breaks_a_rule_ends_with_2(command: Command, llama: Path) -> None:
    result = command("prune", llama, "--dry-run", "--pattern", "3:5", "--calibration", "embedded", "--seqlen", "32")
    assert result.code == 2 and "3:5 does not divide" in result.out.replace("\n", " ")


def test_names_with_brackets_are_shown_as_they_are(
    command: Command, calibration: Path, options: list[Any], tmp_path: Path
) -> None:
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "[bold]in[/nowhere]")
    text = tmp_path / "[red]text[" / "blue].txt"
    text.parent.mkdir()
    text.write_text(tiny_models.text(3))
    output = tmp_path / "[i]out[/b]"
    arguments = ["prune", source, "--include", "(q|k)[_]proj", "--exclude", "[/x]"]
    assert "[_]" in command(*arguments, "--dry-run", *options).out
    result = command(*arguments, "-o", output, "-v", *[text if word == calibration else word for word in options])
    assert result.code == 0, result.err
    assert "[i]out[/b]" in result.out.replace("\n", "")
    assert command("evaluate", output, "--text", text, "--seqlen", "16", "--windows", "1").code == 0
    assert "[/x]" in command("explain", source / "[/x]").err


def test_generate(command: Command, llama: Path, options: list[Any], tmp_path: Path) -> None:
    assert command("prune", llama, "-o", tmp_path / "out", "--method", "magnitude", *options).code == 0
    for model in (llama, tmp_path / "out"):
        texts = [command("generate", model, "--prompt", "the river", "-n", "5", "--seed", "3", *temperature).out
                 for temperature in ([], [], ["--temperature", "1"], ["--temperature", "1"])]  # fmt: skip
        assert texts[0] == texts[1] and texts[2] == texts[3]
        assert all(text.startswith("the river") for text in texts)


def test_generate_draws_no_bars_of_libraries(command: Command, llama: Path, tmp_path: Path) -> None:
    """compressed-tensors would draw two where its matrices are first used."""
    pytest.importorskip("compressed_tensors")
    output = tmp_path / "out"
    made = command("quantize", llama, "-o", output, "--method", "rtn", "--eval", "none", "--no-verify")
    assert made.code == 0, made.err
    result = command("generate", output, "--prompt", "the river", "-n", "2")
    assert result.code == 0 and not result.err, result.err


def test_generate_stops_at_the_end_of_the_context(command: Command, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.random_model("gpt2"), tmp_path / "model")
    result = command("generate", source, "--prompt", "the river", "-n", "500")
    assert result.code == 0 and result.out.startswith("the river")
    result = command("generate", source, "--prompt", tiny_models.text(0, 100))
    assert result.code == 2 and "--prompt" in result.err


def test_generate_never_speaks_with_random_weights(command: Command, llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    source = tiny_models.save(tiny_models.random_model("llama"), tmp_path / "model")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = command("generate", source, "--prompt", "the river")
    assert result.code == 2 and "model.layers.1.mlp.up_proj.weight" in result.err


def test_run_takes_a_ready_recipe(
    command: Command, llama: Path, calibration: Path, heldout: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: mine\nstages:\n- prune: {method: magnitude, sparsity: 0.4}\n- prune: {method: wanda, sparsity: 0.6}\n"
        f"calibration: {{sources: ['{calibration}'], nsamples: 4, seqlen: 16}}\n"
        f"evaluation: {{texts: ['{heldout}'], windows: 2}}\nverify: false\n"
    )
    result = command("run", recipe, "--model", llama, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["recipe"]["name"] == "mine" and len(report["recipe"]["stages"]) == 2
    repeated = command("run", tmp_path / "out" / "recipe.yaml", "--model", llama, "-o", tmp_path / "again", "-q")
    assert repeated.code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
