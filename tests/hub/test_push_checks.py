"""What a folder must be like before it is uploaded: ours, complete, and silent about secrets and this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.report.files import read_report
from compressor.run.push_checks import check_folder

Spoil = Callable[[Path], object]


def edit(name: str, old: str, new: str) -> Spoil:
    """Replaces words in a text."""

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return spoil


def fail_verification(folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text())
    content["verification"]["passed"] = False
    (folder / "report.json").write_text(json.dumps(content))


def shorten_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def want_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put(name: str, content: str = "x") -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return spoil


def test_what_a_run_has_written_passes(made: Path) -> None:
    checked = check_folder(made)
    assert {piece.name for piece in checked.pieces} == {file.name for file in made.iterdir()}
    assert [piece.name for piece in checked.weights] == ["model.safetensors"]
    assert all(piece.text is None for piece in checked.pieces)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "report.json").unlink(), "was not written by compressor"),
        (edit("report.json", '"schema_version": 1', '"schema_version": 0'), "schema_version"),
        (fail_verification, "failed its verification"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has a config.json but no weights"),
        (shorten_weights, "model.safetensors"),
        (want_a_shard, "shard model-00001-of-00002.safetensors is missing"),
        (put("old.safetensors"), "old.safetensors is not part of the model"),
        (put("optimizer.pt"), "optimizer.pt is no file that belongs to a model"),
        (put("pytorch_model.bin"), "pytorch_model.bin is no file that belongs to a model"),
        (put(".env", "A=1"), ".env is a hidden file"),
        (put(".git/config"), ".git is a hidden file"),
        (put("key.pem"), "key.pem is no file that belongs to a model"),
        (lambda folder: (folder / "notes.txt").symlink_to("/etc/hostname"), "notes.txt is a link out of the folder"),
        (put("notes.txt", "one\nhf_" + "a1B2" * 9), "notes.txt, line 2, holds a Hugging Face token"),
        (put("notes.txt", "sk-proj-" + "a1B2" * 9), "line 1, holds an API key"),
        (put("notes.txt", "AKIA" + "A1B2" * 4), "line 1, holds an AWS key"),
        (put("notes.txt", "-----BEGIN RSA PRIVATE KEY-----"), "line 1, holds a private key"),
        (edit("recipe.yaml", "sources: []", "sources: [/home/ann/my.txt]"), "tells of this machine: /home/ann/my.txt"),
        (
            edit("config.json", '"architectures"', '"name_or_path": "/Users/ann/m", "architectures"'),
            "config.json, line",
        ),
        (put("notes.json", '{"a": "C:\\\\Users\\\\ann"}'), "notes.json, line 1, tells of this machine"),
        (put("notes.txt", "see D:\\models\\x"), "notes.txt, line 1, tells of this machine"),
        (edit("report.html", "<body>", "<body>\n/tmp/x/y"), "report.html, line"),
    ],
)
def test_what_is_refused(spoil: Spoil, words: str, copied: Path) -> None:
    spoil(copied)
    with pytest.raises(UserError) as caught:
        check_folder(copied)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unfinished_run_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        check_folder(tmp_path / "absent")
    inside = tmp_path / "out.partial" / "model"
    inside.parent.mkdir()
    inside.symlink_to(made)
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        check_folder(tmp_path / "x.partial")


@pytest.mark.parametrize(
    "harmless",
    [
        "https://example.org/home/page and http://x/tmp/y",
        "and/or, a/tmp/b, ~/models/x, ./tmp/x, 1/2",
        "A:\\nB, C:\\t",
        "hf_short sk-learn AKIA",
        "fetch it: /api/models",
    ],
)
def test_what_only_looks_like_it(harmless: str, copied: Path) -> None:
    (copied / "notes.txt").write_text(harmless)
    assert check_folder(copied)


def test_tokens_of_a_vocabulary_are_no_paths(copied: Path) -> None:
    (copied / "vocab.json").write_text(json.dumps({"/home/user": 1, "/tmp/x": 2}))
    assert check_folder(copied)


def test_paths_are_shortened_or_allowed(copied: Path) -> None:
    edit("recipe.yaml", "sources: []", "sources: [/home/ann/texts/my.txt]")(copied)
    before = (copied / "recipe.yaml").read_text()
    pieces = {piece.name: piece for piece in check_folder(copied, paths="shorten").pieces}
    assert pieces["recipe.yaml"].text == before.replace("/home/ann/texts/my.txt", "my.txt")
    assert pieces["recipe.yaml"].size == len(before) - len("/home/ann/texts/")
    assert pieces["report.json"].text is None
    assert all(piece.text is None for piece in check_folder(copied, paths="allow").pieces)
    assert (copied / "recipe.yaml").read_text() == before, "the folder itself is left alone"


def test_the_command_in_a_report_names_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.cli.common import typed_command

    words = ["compressor", "prune", "/home/ann/model", "-o", "out", "--calibration=/data/my.txt", "--sparsity", "0.5"]
    monkeypatch.setattr("sys.argv", words)
    assert typed_command() == "compressor prune model -o out --calibration=my.txt --sparsity 0.5"


def test_what_a_run_says_of_loading_is_what_it_did(made: Path) -> None:
    report = read_report(made)
    ours, reader = report.runtimes
    assert ours.passed and ours.command.startswith("import compressor")
    assert reader.passed and "trust_remote_code=True" in reader.command and "import compressor" not in reader.command
    for entry in report.runtimes:
        assert entry.difference is not None and entry.allowed is not None and 0 <= entry.difference <= entry.allowed
    card = (made / "README.md").read_text()
    assert card.count("```python") == 2 and ours.command in card and reader.command in card
