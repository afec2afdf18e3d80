"""The schema: round trip, strictness, and what a reader of another version is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from compressor.errors import UserError
from compressor.report.files import read_report, write_report
from compressor.report.schema import Report

Make = Callable[..., Report]


def test_round_trip(make_report: Make, tmp_path: Path) -> None:
    report = make_report()
    write_report(report, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "report.html", "report.json"]
    assert read_report(tmp_path) == report
    assert read_report(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 1


def test_an_overflown_perplexity_survives_and_the_file_is_strict_json(make_report: Make, tmp_path: Path) -> None:
    report = make_report()
    report.evaluation[0].rows[1].perplexity = math.inf
    report.evaluation[0].rows[2].perplexity = math.nan
    write_report(report, tmp_path)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    rows = read_report(tmp_path).evaluation[0].rows
    assert rows[1].perplexity == math.inf
    assert math.isnan(rows[2].perplexity)


def test_unknown_fields_are_refused(make_report: Make) -> None:
    content = make_report().model_dump()
    content["size"]["bytes_saved"] = 1
    with pytest.raises(ValidationError, match="bytes_saved"):
        Report.model_validate(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not a compressor report"),
        ("[]", "is not a compressor report"),
        ("{}", "is not a compressor report"),
        ('{"schema_version": 99}', "schema_version 99, this version of compressor reads 1"),
        ('{"schema_version": 1}', "is not a valid report: tool: Field required"),
    ],
)
def test_bad_reports_name_the_file_and_the_reason(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        read_report(tmp_path)
    assert "report.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the report"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_report(tmp_path)
