"""compare: what may stand side by side, and what is marked instead."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from compressor.cli.compare import compare
from compressor.errors import UserError
from compressor.report.comparison import compare_texts, missing_commands, read_entries
from compressor.report.files import write_report
from compressor.report.schema import Report

Make = Callable[..., Report]


def put(folder: Path, report: Report) -> Path:
    folder.mkdir(parents=True)
    write_report(report, folder)
    return folder


def plain_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
    save_file({"model.layers.0.q.weight": torch.ones(4, 4), "embed.weight": torch.ones(8, 4)}, folder / "m.safetensors")
    return folder


def test_same_protocol_stands_in_one_group(make_report: Make, tmp_path: Path) -> None:
    other = make_report()
    other.evaluation[0].rows[1].perplexity = 13.0
    groups = compare_texts(
        read_entries([put(tmp_path / "a", make_report()), put(tmp_path / "b", other) / "report.json"])
    )
    assert len(groups) == 1
    assert groups[0].differs == []
    assert groups[0].doubts == []
    shown = [(line.label, line.row.perplexity) for line in groups[0].lines if line.row.who != "baseline"]
    assert shown == [("dense: toy", 12.3), ("a", 14.1), ("b", 13.0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": {"seqlen": 512, "stride": 256, "bos": "none"}}, "seqlen 256 / 512"),
        ({"tokens_sha256": "other"}, "other tokens"),
        ({"text_sha256": "other", "tokens_sha256": "other"}, "another text of this name"),
        ({"windows": 21}, "another evaluation"),
    ],
)
def test_other_protocols_are_kept_apart_and_marked(
    make_report: Make, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    other = make_report()
    other.evaluation[0] = other.evaluation[0].model_copy(update=change)
    groups = compare_texts(read_entries([put(tmp_path / "a", make_report()), put(tmp_path / "b", other)]))
    assert len(groups) == 2
    assert reason in groups[0].differs
    assert groups[1].differs
    assert not {line.entry for line in groups[0].lines} & {line.entry for line in groups[1].lines}


def test_where_a_text_lies_does_not_matter(make_report: Make, tmp_path: Path) -> None:
    reports = [make_report(), make_report()]
    for index, report in enumerate(reports):
        report.evaluation[0].protocol["path"] = f"/somewhere/{index}"
    assert len(compare_texts(read_entries([put(tmp_path / str(i), report) for i, report in enumerate(reports)]))) == 1


def test_an_export_that_rounds_was_measured_before(make_report: Make, tmp_path: Path) -> None:
    paths = [put(tmp_path / "a", make_report()), put(tmp_path / "b", make_report(exported=True))]
    packed, export = read_entries(paths)
    (group,) = compare_texts([packed, export])
    assert group.doubts == ["b was measured before its export rounded some values once more"]
    assert (export.weight_bytes, export.bits_linears, export.bits_model) == (345_678, 4.5, 5.1)
    (paths[1] / "toy-Q4_0.gguf").write_bytes(b"GGUF" + bytes(96))
    assert read_entries(paths)[1].weight_bytes == 100, "what lies there counts"
    (paths[1] / "report.json").unlink()
    export.report.evaluation.clear()  # type: ignore[union-attr]
    assert missing_commands([packed, export]) == [], "compressor does not run gguf"


def test_doubts(make_report: Make, tmp_path: Path) -> None:
    other = make_report()
    other.model.source = "another"
    other.evaluation[0].in_domain = True
    groups = compare_texts(read_entries([put(tmp_path / "a", make_report()), put(tmp_path / "b", other)]))
    assert any("b was calibrated on this kind of text" in doubt for doubt in groups[0].doubts)
    assert any("different dense models" in doubt for doubt in groups[0].doubts)
    unhashed = [make_report(), make_report()]
    for report in unhashed:
        report.evaluation[0].tokens_sha256 = ""
    groups = compare_texts(read_entries([put(tmp_path / f"u{i}", report) for i, report in enumerate(unhashed)]))
    assert any("no hash" in doubt for doubt in groups[0].doubts)


def test_plain_folders_show_their_size_and_the_command_that_measures(make_report: Make, tmp_path: Path) -> None:
    entries = read_entries([put(tmp_path / "a", make_report()), plain_folder(tmp_path / "plain one")])
    assert entries[1].bits_linears == 32
    assert entries[1].weight_bytes == (tmp_path / "plain one" / "m.safetensors").stat().st_size
    assert missing_commands(entries) == [
        ("plain one", f"compressor evaluate '{tmp_path / 'plain one'}' --against toy"),
    ]


def test_the_command_that_measures_names_a_model_as_it_was_named(make_report: Make, tmp_path: Path) -> None:
    entries = read_entries([put(tmp_path / "a", make_report()), Path("embedded")])
    assert missing_commands(entries) == [("embedded", "compressor evaluate embedded --against toy")]


def test_equal_names_get_their_parents(make_report: Make, tmp_path: Path) -> None:
    paths = [put(tmp_path / parent / "out", make_report()) for parent in ("x", "y")]
    assert [entry.label for entry in read_entries(paths)] == ["x/out", "y/out"]
    assert [entry.label for entry in read_entries([paths[0], paths[0]])] == ["x/out #1", "x/out #2"]


def test_mistakes(make_report: Make, tmp_path: Path) -> None:
    folder = put(tmp_path / "a", make_report())
    with pytest.raises(UserError, match="at least two"):
        read_entries([folder])
    with pytest.raises(UserError, match="does not exist"):
        read_entries([folder, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        read_entries([folder, tmp_path / "empty"])


def test_command(make_report: Make, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(compare)
    other = make_report()
    other.evaluation[0].rows[1].perplexity = math.inf
    other.evaluation[0].protocol["seqlen"] = 999
    paths = [str(put(tmp_path / "a", make_report())), str(put(tmp_path / "b\x1b[31m", other))]
    shown = CliRunner().invoke(app, paths)
    assert shown.exit_code == 0, shown.output
    assert "not comparable with the other table of this text: seqlen 256 / 999" in shown.output
    assert "\x1b" not in shown.output
    parsed = CliRunner().invoke(app, [*paths, "--json"])
    content = json.loads(parsed.output)
    assert [model["label"] for model in content["models"]] == ["a", "b\x1b[31m"]
    assert content["texts"][1]["rows"][1]["perplexity"] == "Infinity"
