"""``compressor explain PATH``: what is in a model folder, and what can load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.tables import Sheet, add_row, json_text, new_table, say, wide_console
from compressor.engine.hub_names import shown_name
from compressor.errors import UserError
from compressor.report.names import fold_names
from compressor.report.numbers import ABSENT, bytes_text, parameters_text, percent, share, significant
from compressor.report.schema import LINEARS, LedgerRow

if TYPE_CHECKING:
    from compressor.report.contents import Contents, Item


def explain(
    path: Annotated[
        str,
        typer.Argument(
            help="Model folder (ours, a plain one, another quantizer's), a .gguf file, or a hub id, which is fetched.",
            metavar="MODEL",
        ),
    ],
    scan: Annotated[bool, typer.Option("--scan", help="Read the dense matrices and count their zeros.")] = False,
    every: Annotated[bool, typer.Option("--all", help="One line for every tensor, without folding blocks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object, nothing folded.")] = False,
) -> None:
    """Show the formats, bits, sparsity and size ledger of a model folder, and what can load it. Reads headers only."""
    from compressor.report.contents import read_contents
    from compressor.report.gguf_contents import gguf_in, read_gguf

    file = gguf_in(Path(path))
    if file is not None and scan:
        raise UserError("--scan reads model folders, not gguf files", fix="leave --scan out")
    contents = read_contents(path, scan=scan) if file is None else read_gguf(file)
    if as_json:
        typer.echo(json_text(explain_json(contents)))
        return
    console = wide_console()
    for line in summary(contents):
        say(console, line)
    console.print(tensor_table(contents.items, fold=not every))
    console.print(ledger_table(contents.ledger()))
    for sentence in contents.storage.loads:
        say(console, f"  loads: {sentence}")
    for sentence in contents.storage.refuses:
        say(console, f"  does not load: {sentence}")


def summary(contents: Contents) -> list[str]:
    """Two lines on the whole: what it is, how large."""
    config = contents.config
    base = config.get("base_model_type")
    kind = f"{config.get('model_type', 'no model_type')}{f' of {base}' if base else ''}"
    architecture = (config.get("architectures") or ["no architecture named"])[0]
    tied = ", output head tied to the embedding" if config.get("tie_word_embeddings") else ""
    linears = contents.bits(*LINEARS)
    own = f"{parameters_text(contents.stored_parameters)} parameters"
    if contents.stored_parameters != contents.parameters:  # matrices stored as products
        own += f", which stand for {parameters_text(contents.parameters)}"
    return [
        f"{shown_name(contents.folder)}: {architecture} ({kind}), stored as {contents.storage.method}{tied}",
        f"{bytes_text(contents.weight_bytes)} of weight files for {own}; "
        f"bits per weight: linears {significant(linears, 3)}, whole model {significant(contents.bits(), 3)}",
    ]


def tensor_table(items: Sequence[Item], *, fold: bool) -> Sheet:
    """One line for each item, or for all that differ in the numbers of their names only."""
    table = new_table("Tensors", ("name", "format"), ("count", "shape", "sparsity", "bits per weight", "bytes"))
    for name, members in folded(items) if fold else [(item.name, [item]) for item in items]:
        add_row(
            table,
            name,
            members[0].format,
            str(len(members)),
            " x ".join(str(side) for side in members[0].shape) or "scalar",
            _span([item.sparsity for item in members], lambda value: percent(value)),
            _span([item.bits_per_weight for item in members], lambda value: significant(value, 3)),
            bytes_text(sum(item.bytes for item in members)),
        )
    return table


def folded(items: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    """Items of one group, format and shape whose names differ in numbers only, under one name."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Item]] = {}
    for item in items:
        alike.setdefault((item.group, item.format, item.shape), []).append(item)
    lines = []
    for members in alike.values():
        by_name = {item.name: item for item in members}
        lines += [(text, [by_name[name] for name in names]) for text, names in fold_names(by_name)]
    place = {item.name: index for index, item in enumerate(items)}
    return sorted(lines, key=lambda line: place[line[1][0].name])


def _span(values: Sequence[float | None], show: Any) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    low, high = show(min(known)), show(max(known))
    return str(low) if low == high else f"{low} to {high}"


def ledger_table(rows: Sequence[LedgerRow]) -> Sheet:
    """The size ledger."""
    products = any(row.stored_parameters not in (None, row.parameters) for row in rows)
    counts = ("parameters", "of the source") if products else ("parameters",)
    table = new_table("Where the bytes are", ("what", "format"), ("tensors", *counts, "bytes", "bits", "share"))
    for row in rows:
        add_row(
            table,
            row.group,
            row.format,
            f"{row.tensors:,}" if row.tensors else ABSENT,
            *(f"{count:,}" if count else ABSENT for count in (row.stored_parameters, row.parameters)[not products :]),
            bytes_text(row.bytes),
            significant(row.bits_per_weight, 3),
            share(row.share),
        )
    table.add_section()
    add_row(table, "all", "", "", *("" for _ in counts), bytes_text(sum(row.bytes for row in rows)), "", "")
    return table


def explain_json(contents: Contents) -> dict[str, Any]:
    """Everything ``explain`` knows, unfolded."""
    config = contents.config
    return {
        "name": shown_name(contents.folder),
        "model_type": config.get("model_type"),
        "base_model_type": config.get("base_model_type"),
        "architectures": config.get("architectures"),
        "storage": contents.storage.method,
        "loads": list(contents.storage.loads),
        "does_not_load": list(contents.storage.refuses),
        "parameters": contents.parameters,
        "stored_parameters": contents.stored_parameters,
        "weight_bytes": contents.weight_bytes,
        "disk_bytes": contents.disk_bytes,
        "bits_per_weight_linears": contents.bits(*LINEARS),
        "bits_per_weight_model": contents.bits(),
        "ledger": [row.model_dump() for row in contents.ledger()],
        "tensors": [
            {
                "name": item.name,
                "group": item.group,
                "format": item.format,
                "shape": list(item.shape),
                "tensors": item.tensors,
                "parameters": item.parameters,
                "stored_parameters": item.stored_parameters,
                "bytes": item.bytes,
                "bits_per_weight": item.bits_per_weight,
                "sparsity": item.sparsity,
            }
            for item in contents.items
        ],
    }
