"""Writing a report beside the model it describes, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from compressor.engine.journal import write_atomically
from compressor.errors import UserError
from compressor.report.card import model_card
from compressor.report.html import render_html
from compressor.report.schema import SCHEMA_VERSION, Report

REPORT = "report.json"


def write_report(report: Report, folder: Path | str, *, source_card: str | None = None) -> None:
    """Write ``report.json``, ``report.html`` and ``README.md`` into an existing ``folder``.

    Args:
        source_card: text of the source model's README.md, from which the card inherits licence and languages.
    """
    folder = Path(folder)
    (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report, source_card), encoding="utf-8")


def update_report(report: Report, folder: Path | str) -> list[str]:
    """Write a report that has grown over the one in ``folder``; card and page follow. Each file is replaced whole.

    A card that a person has edited is left as it is, since there is no telling what it should become. An export has no
    page, and gets none.

    Returns:
        Names of the files that were left as they are.

    Raises:
        UserError: ``folder`` holds no report.
    """
    folder = Path(folder)
    old = read_report(folder)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    ours = text is None or text == model_card(old, text)  # licence and languages stand in its own head by now
    write_atomically(folder / REPORT, report.model_dump_json(indent=1) + "\n")
    if report.exported is None:
        write_atomically(folder / "report.html", render_html(report))
    if ours:
        write_atomically(card, model_card(report, text))
    return [] if ours else [card.name]


def read_report(path: Path | str) -> Report:
    """Read a report from a ``report.json`` or from the folder that holds one.

    Args:
        path: of the file, or of its folder.

    Raises:
        UserError: no such file, not a report, or one of another schema version.
    """
    path = Path(path)
    file = path / REPORT if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read the report {str(file)!r}: {reason}") from error
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(file)!r} is not a compressor report: expected a JSON object with schema_version"
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{str(file)!r} has schema_version {version!r}, this version of compressor reads {SCHEMA_VERSION}",
            fix="use the version of compressor that wrote it (field tool.version), or run the evaluation again",
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{str(file)!r} is not a valid report: {where}: {first['msg']}") from error
