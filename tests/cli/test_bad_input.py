"""Every mistake a user can make: one line that names it, exit code 2, nothing written, the input untouched."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import Command

from compressor.engine import output

SHORT = ["--nsamples", "4", "--seqlen", "16", "--eval", "none", "--no-verify"]


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "in" / "model"))


@pytest.fixture
def refused(command: Command, model: Path, calibration: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run ``prune`` on the model and check how it refuses; returns the error line."""
    output = tmp_path / "out" / "pruned"
    output.parent.mkdir()

    def check(*options: Any, source: Any = None, words: str = "", to: Any = None) -> str:
        defaults = [] if "--calibration" in options else ["--calibration", calibration]
        before = tiny_models.digest(tmp_path)
        result = command("prune", source or model, "-o", to or output, *SHORT, *defaults, *options)
        assert result.code == 2, result
        lines = [line for line in result.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), result.err
        assert "Traceback" not in result.err and result.out == ""
        for word in words.split("|"):
            assert word in lines[0]
        assert tiny_models.digest(tmp_path) == before
        assert to is not None or not list(output.parent.iterdir())
        return lines[0]

    yield check


def test_paths_that_are_no_model(refused: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(source=tmp_path / "absent", words="absent|no model")
    refused(source="./absent", words="absent")
    refused(source="absent", words="absent|embedded")
    refused(source=model / "config.json", words="is a file, not a model folder")
    refused(source=tmp_path / "empty", words="not a model folder|config.json")
    refused(source="x" * 5000, words="xxx")
    refused(source="with\nnewline", words="newline")


def test_a_hub_id_that_cannot_be_fetched(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(source="org/name", words="org/name|hub|ConnectionError")


def test_no_output(command: Command, llama: Path) -> None:
    result = command("prune", llama)
    assert result.code == 2 and "-o FOLDER" in result.err and result.err.count("\n") == 1


def test_a_folder_that_may_not_be_read(refused: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.read_text

    def denied(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    refused(words="config.json|Permission denied")


def test_weights_that_are_damaged(refused: Any, model: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"garbage" * 10):
        file.write_bytes(content)
        refused(words="model.safetensors")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refused(words="model.safetensors|pointer of Git LFS|git lfs pull")
    file.unlink()
    refused(words="no weights")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(words="model-00001-of-00002.safetensors|missing")
    index["weight_map"]["a"] = "../../secret.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(words="outside the folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(refused: Any, model: Path, value: float, name: str) -> None:
    tiny_models.retensor(model, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    refused(words=f"{name}|NaN or infinite")


def test_wrong_shapes_and_dtypes(refused: Any, model: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tiny_models.retensor(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(words=f"{name}|int8")
    tiny_models.retensor(model, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    refused(words=f"{name}|[3, 3]")


def test_tokenizers(refused: Any, model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    refused(words="tokenizer")
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(words="no tokenizer")


def test_calibration_text(refused: Any, tmp_path: Path) -> None:
    empty, short, table = (tmp_path / name for name in ("empty.txt", "short.txt", "rows.jsonl"))
    empty.write_text("")
    short.write_text("too short")
    table.write_text('{"body": "a text"}\n' * 50)
    refused("--calibration", empty, words="empty")
    refused("--calibration", short, words="too short|--nsamples")
    refused("--calibration", f"{table}:field=bdy", words="bdy|body")
    refused("--calibration", tmp_path / "absent.txt", words="absent.txt")
    refused("--calibration", "wikitxt2", words="wikitxt2|'wikitext2'")
    refused("--seqlen", "65", words="65|context of 64|--seqlen")


def test_evaluation_text_is_refused_in_the_flags_of_the_verb(command: Command, llama: Path, tmp_path: Path) -> None:
    """Whoever typed --eval is not told to mend --text or --calibration."""
    empty, short, raw = (tmp_path / name for name in ("empty.txt", "short.txt", "raw.txt"))
    empty.write_text("")
    short.write_text("too short")
    raw.write_bytes(b"\xff\xfe")
    for text, words in (
        (empty, "evaluation text 'empty.txt'|--eval"),
        (short, "too short|--eval-windows or --eval-seqlen|--eval"),
        (raw, "UTF-8|--eval"),
        (tmp_path / "absent.txt", "evaluation text|absent.txt|--eval"),
        ("embeded-heldout", "'embedded-heldout'|--eval"),
    ):
        result = command("prune", llama, "-o", tmp_path / "out", "--method", "magnitude", "--eval", text)
        assert result.code == 2 and all(word in result.err for word in words.split("|")), result
        assert not any(word in result.err for word in ("--text", "--calibration", "calibration s")), result
        result = command("evaluate", llama, "--text", text)
        assert result.code == 2 and "--text" in result.err and "--calibration" not in result.err, result


def test_numbers_out_of_range(refused: Any) -> None:
    for sparsity in ("0", "1", "1.5", "-0.5", "nan"):
        refused("--sparsity", sparsity, words="sparsity")
    refused("--pattern", "4:2", words="4:2")
    refused("--pattern", "two:four", words="two:four|N:M")
    refused("--pattern", "3:5", words="3:5|divide|32")
    refused("--pattern", "2:4", "--sparsity", "0.5", words="exclude each other")
    refused("--nsamples", "0", words="nsamples")
    refused("--bits", "9", words="bits")
    refused("--include", "(", words="regular expression")
    refused("--include", "nothing", words="--include")


def test_unknown_names(refused: Any) -> None:
    refused("--method", "sparsgpt", words="sparsgpt|did you mean 'sparsegpt'")
    refused("--method", "wanda", "--bits", "4", words="bits")
    refused("--device", "abacus", words="abacus|--device")
    refused("--device", "cuda:99", words="cuda:99|--device")
    refused("--eval", "wikitxt2-test", words="'none'|exclude")


def test_words_that_the_parser_refuses(refused: Any) -> None:
    refused("--sparsity", "half", words="number|--sparsity")
    refused("--save", "zip", words="zip|packed")
    refused("--sparsty", "0.5", words="--sparsty|--sparsity")
    refused("--nsamples", words="--nsamples|see compressor prune --help")


def test_a_flag_of_another_method_names_those_that_it_may_stand_for(command: Command, llama: Path) -> None:
    result = command("quantize", llama, "-o", "out", "--method", "pb-llm", "--bits", "4")
    assert result.code == 2 and "unknown key 'bits' (did you mean 'correct_bits' or 'salient_bits'?)" in result.err


def test_a_verb_that_does_not_exist(command: Command) -> None:
    result = command("prun", "model")
    assert result.code == 2 and "'prun'" in result.err and "see compressor --help" in result.err, result


def test_outputs_that_must_not_be_written(refused: Any, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    refused(to=theirs, words="theirs|not written by compressor")
    refused("--overwrite", to=theirs, words="theirs|not written by compressor")
    refused(to=theirs / "thesis.txt", words="thesis.txt")
    refused(to=theirs / "thesis.txt" / "below", words="thesis.txt|--output")
    for name, target in (("nowhere", tmp_path / "absent"), ("elsewhere", theirs)):
        (tmp_path / name).symlink_to(target)
        refused("--overwrite", to=tmp_path / name, words=f"{name}|symbolic link")
        (tmp_path / name).unlink()
    refused(to=model, words="input folder")
    refused(to=model / "pruned", words="input folder")
    refused(to=model.parent, words="input folder")
    monkeypatch.chdir(model)
    refused(to=".", words="input folder")


def test_folders_that_cannot_be_written(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    refused(words="cannot write")


def test_a_full_disk(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    refused(words="GB free|needs|--output")


def test_an_error_of_the_system_is_one_line_too(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "pruned.partial":
            raise OSError(30, "Read-only file system", str(self))
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(words="Read-only file system")


def test_a_disk_that_fills_up_during_the_run(
    command: Command, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's error names no file; ours says what to do, and the same command goes on."""
    written = output.write_file

    def full(path: Path, *args: Any) -> int:
        if path.name.startswith("model-00003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, *args)

    words = ["prune", model, "-o", tmp_path / "out", "--calibration", calibration, *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_file", full)
        result = command(*words)
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert result.err.splitlines()[-1].startswith("error: the disk is full (")
    assert "make room and run the same again" in result.err
    result = command(*words)
    assert result.code == 0 and "resuming after block" in result.err, result


def test_models_that_are_none_of_ours(refused: Any, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())

    def with_config(**changes: Any) -> None:
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    with_config(model_type="t5", is_encoder_decoder=True)
    refused(words="encoder-decoder")
    with_config(quantization_config={"quant_method": "awq"})
    refused(words="already quantized|awq")
    with_config(model_type="martian")
    refused(words="martian")
    with_config(num_hidden_layers=3)
    refused(words="lacks the tensor")
    with_config(num_attention_heads=3)
    refused()
    (model / "config.json").write_text('{"hidden_size": 3}')
    refused()


def test_chains_that_cannot_be(refused: Any, command: Command, model: Path, calibration: Path, tmp_path: Path) -> None:
    options = ["--calibration", calibration, *SHORT]
    assert command("prune", model, "-o", tmp_path / "codes", "--bits", "4", *options).code == 0
    refused(source=tmp_path / "codes", words="already quantized")
    assert command("prune", model, "-o", tmp_path / "half", "--method", "magnitude", *options).code == 0
    refused(source=tmp_path / "half", words="already pruned to 50")
    refused(to=tmp_path / "half", words="exists already|--overwrite")


def test_recipes(command: Command, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for content, words in (
        ("stages: [{prune: {method: wanda, sparsty: 0.5}}]", ["sparsty", "'sparsity'"]),
        ("stages: [{prune: {method: wanda}}]\ncalibratoin: {}", ["calibratoin", "'calibration'"]),
        ("stages: [", ["YAML"]),
    ):
        recipe.write_text(content)
        for verb in (["run", recipe, "--model", model, "-o", tmp_path / "out"], ["plan", recipe, "--model", model]):
            result = command(*verb)
            assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1
            assert all(word in result.err for word in words)
    assert command("run", "sparsgpt-50", "--model", model, "-o", tmp_path / "out").code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "generate", "explain", "compare", "plan", "prune", "run"])
def test_every_verb_refuses_what_is_no_model(verb: str, command: Command, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    arguments = {
        "evaluate": [absent],
        "generate": [absent, "--prompt", "x"],
        "explain": [absent],
        "compare": [absent, absent],
        "plan": ["sparsegpt-50", "--model", absent],
        "prune": [absent, "-o", tmp_path / "out"],
        "run": ["sparsegpt-50", "--model", absent, "-o", tmp_path / "out"],
    }[verb]
    result = command(verb, *arguments)
    assert result.code == 2, result
    assert result.err.startswith("error: ") and "absent" in result.err and result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_generate_and_evaluate_mistakes(command: Command, llama: Path, heldout: Path) -> None:
    for arguments, word in (
        (["generate", llama, "--prompt", ""], "--prompt"),
        (["generate", llama, "--prompt", "x", "--device", "abacus"], "abacus"),
        (["generate", llama, "--prompt", "x", "--dtype", "int4"], "int4"),
        (["evaluate", llama, "--text", heldout, "--dtype", "int4"], "int4"),
        (["evaluate", llama, "--text", heldout, "--seqlen", "16", "--stride", "17"], "--stride"),
        (["evaluate", llama, "--text", heldout, "--windows", "99999", "--seqlen", "16"], "too short"),
    ):
        result = command(*arguments)
        if word == "too short":  # fewer windows are taken, and the table says how many
            assert result.code == 0
            continue
        assert result.code == 2 and word in result.err and result.err.count("\n") == 1, result


def test_debug_shows_the_traceback(command: Command, tmp_path: Path) -> None:
    from compressor.errors import UserError

    with pytest.raises(UserError):
        command("--debug", "prune", tmp_path / "absent", "-o", tmp_path / "out")
