"""``compressor compare A B ...``: models side by side, and only what may be compared beside each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.tables import Sheet, add_row, json_text, new_table, printable, say, wide_console
from compressor.report.environment import plain
from compressor.report.numbers import ABSENT, bytes_text, change, percent, significant

LONG_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")

if TYPE_CHECKING:
    from compressor.report.comparison import Entry, Group


def compare(
    models: Annotated[
        list[Path], typer.Argument(help="Model folders, hub ids or report.json files, two or more.", metavar="MODEL...")
    ],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Also write a page that plots bytes against perplexity.", metavar="FILE.html"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Also write a page with everything side by side.", metavar="FILE.html"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Compare bytes, bits per weight, and quality where it was measured by the same protocol on the same tokens."""
    from compressor.report.compare_page import check_target, write_page, write_side_by_side
    from compressor.report.comparison import compare_texts, missing_commands, read_entries

    plot, html = (path.expanduser() if path else None for path in (plot, html))
    for path, flag in ((plot, "--plot"), (html, "--html")):
        if path:
            check_target(path, flag)
    entries = read_entries(models)
    groups = compare_texts(entries)
    missing = missing_commands(entries)
    if plot:
        write_page(plot, entries, groups)
    if html:
        write_side_by_side(html, entries, groups)
    if as_json:
        typer.echo(json_text(compare_json(entries, groups, missing)))
        return
    console = wide_console()
    console.print(size_table(entries))
    for group in groups:
        console.print(quality_table(group))
        if group.differs:
            tables = "table" if sum(other.name == group.name for other in groups) == 2 else "tables"
            say(console, f"  ! not comparable with the other {tables} of this text: {'; '.join(group.differs)}")
        for doubt in group.doubts:
            say(console, f"  ! {doubt}")
        if group.differs or group.doubts:
            console.print()
    for label, command in missing:
        say(console, f"  {label} was not measured; this measures it: {command}")
    if plot:
        say(console, f"Plotted in {plot}")
    if html:
        say(console, f"Side by side in {html}")


def size_table(entries: Sequence[Entry]) -> Sheet:
    """Bytes on disk and bits per weight; the last column is relative to the first model."""
    table = new_table("Size", ("model",), ("weight files", "folder", "bits, linears", "bits, model", "of the first"))
    first = entries[0].weight_bytes
    for entry in entries:
        add_row(
            table,
            entry.label,
            bytes_text(entry.weight_bytes),
            bytes_text(entry.disk_bytes),
            significant(entry.bits_linears, 3),
            significant(entry.bits_model, 3),
            percent(entry.weight_bytes / first) if first else ABSENT,
        )
    return table


def quality_table(group: Group) -> Sheet:
    """All measurements on one text by one protocol."""
    mark = " !" if group.differs else ""
    protocol = LONG_HASH.sub(r"\1...", plain(group.protocol))
    title = printable(f"{group.name}{mark} ({protocol})")
    table = new_table(title, ("model",), ("perplexity", "to dense", "bits per byte", "KL", "same first choice"))
    dense = {line.entry: line.row.perplexity for line in group.lines if line.row.who == "dense"}
    only = next(iter(dense.values())) if len(set(dense.values())) == 1 else None
    for line in group.lines:
        reference = dense.get(line.entry, only)
        relative = line.row.who != "dense" and reference is not None
        add_row(
            table,
            line.label,
            significant(line.row.perplexity),
            change(line.row.perplexity, reference) if relative and reference is not None else ABSENT,
            significant(line.row.bits_per_byte),
            significant(line.row.kl, 3),
            percent(line.row.top1),
        )
    return table


def compare_json(entries: Sequence[Entry], groups: Sequence[Group], missing: Sequence[tuple[str, str]]) -> Any:
    """The same for machines."""
    return {
        "models": [
            {
                "label": entry.label,
                "path": str(entry.path),
                "weight_bytes": entry.weight_bytes,
                "disk_bytes": entry.disk_bytes,
                "bits_per_weight_linears": entry.bits_linears,
                "bits_per_weight_model": entry.bits_model,
                "source": entry.source,
                "has_report": entry.report is not None,
            }
            for entry in entries
        ],
        "texts": [
            {
                "name": group.name,
                "protocol": group.protocol,
                "text_sha256": group.text_sha256,
                "tokens_sha256": group.tokens_sha256,
                "not_comparable_because": group.differs,
                "doubts": group.doubts,
                "rows": [{"model": line.entry, **line.row.model_dump()} for line in group.lines],
            }
            for group in groups
        ],
        "missing": [{"model": label, "command": command} for label, command in missing],
    }
