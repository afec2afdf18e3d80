"""``compressor export`` as typed."""

from __future__ import annotations

from pathlib import Path

import repacked
import tiny_models
from command_line import Command


def test_export(command: Command, llama: Path, tmp_path: Path) -> None:
    packed = repacked.repack(llama, tmp_path / "packed", repacked.everything)
    result = command("export", packed, tmp_path / "plain", "--format", "dense")
    assert result.code == 0 and "packed matrices were unpacked" in result.out, result
    assert "checked: transformers (" in result.out and "logits of 64 tokens in a fresh process" in result.out
    again = command("export", packed, tmp_path / "again", "--no-verify")  # dense is the default
    assert "no program has loaded it yet" in again.out
    plain, unchecked = (tiny_models.digest(tmp_path / name) for name in ("plain", "again"))
    assert again.code == 0 and {name for name in plain if plain[name] != unchecked[name]} == {"README.md"}
    assert command("export", packed, "--no-verify").code == 0  # beside the model is where it goes by default
    assert tiny_models.digest(tmp_path / "packed-dense") == unchecked
    assert command("generate", tmp_path / "plain", "--prompt", "the", "-n", "2").code == 0


def test_mistakes_are_one_line(command: Command, llama: Path, tmp_path: Path) -> None:
    for arguments, word in (
        ([llama, tmp_path / "out"], "plain checkpoint already"),
        ([llama, tmp_path / "out", "--format", "ggml"], "'dense'"),
        ([llama, tmp_path / "out", "--type", "F16"], "--type belongs to --format gguf"),
        ([llama, tmp_path / "out", "--dry-run"], "--dry-run belongs to --format gguf"),
        ([tmp_path / "absent", tmp_path / "out"], "no model at"),
        (["--format", "dense"], "MODEL"),
    ):
        result = command("export", *arguments)
        assert result.code == 2 and result.out == "", result
        lines = result.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], result.err
    assert not list(tmp_path.iterdir())
