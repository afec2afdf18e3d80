"""How large the folder is that a report lies in: an export of a packed folder has a size of its own."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.report.schema import Report


@dataclass(frozen=True)
class Footprint:
    """Bytes and bits of a folder.

    Attributes:
        weight_bytes: of the weight files.
        disk_bytes: of all files but report, page and card; None where an older report does not say.
        bits_linears, bits_model: bits for each source parameter; the same.
    """

    weight_bytes: int
    disk_bytes: int | None
    bits_linears: float | None
    bits_model: float | None


def stored_parameters(report: Report) -> tuple[int, int]:
    """Parameters of the source and of the result as they are stored: where matrices are products, of the factors.

    Of an export it is what it was made from that is meant.
    """
    size = report.size
    before = report.model.parameters if size.source_stored_parameters is None else size.source_stored_parameters
    rows = size.ledger
    return before, sum(row.parameters if row.stored_parameters is None else row.stored_parameters for row in rows)


def has_products(report: Report) -> bool:
    """Whether the result has matrices that are stored as products, and so other parameters than its source."""
    return any(row.stored_parameters not in (None, row.parameters) for row in report.size.ledger)


def footprint(report: Report) -> Footprint:
    """What the report says of its folder."""
    size, form = report.size, report.exported
    if form is None:
        return Footprint(size.output_bytes, size.disk_bytes, size.bits_per_weight_linears, size.bits_per_weight_model)
    return Footprint(form.file_bytes, form.disk_bytes, form.bits_per_weight_linears, form.bits_per_weight_model)
