"""The runs that made a source: its own report tells, where it is an output of ours."""

from __future__ import annotations

import os

from compressor.engine.checkpoint import Checkpoint
from compressor.errors import UserError
from compressor.report.chain import summary_of
from compressor.report.files import REPORT, read_report
from compressor.report.footprint import footprint
from compressor.report.schema_chain import EarlierRun

SAME = 0.01  # relative difference of bytes up to which a report is of these weights


def history_of(source: Checkpoint) -> tuple[list[EarlierRun], list[str]]:
    """Earlier runs, the oldest first, and warnings for the report.

    A report that cannot be read, or that speaks of weights of another size, is not used, and that is said.
    """
    if not (source.folder / REPORT).is_file():
        return [], []
    try:
        report = read_report(source.folder)
    except UserError as error:
        words = str(error).replace(f"{source.folder}{os.sep}", "")  # a report is made to be shown
        return [], [f"the source has a report that says nothing of how it was made: {words}"]
    told = footprint(report).weight_bytes
    if abs(told - source.disk_bytes) > SAME * source.disk_bytes:
        return [], [
            f"the source's {REPORT} speaks of {told:,} bytes of weights, there are {source.disk_bytes:,}: "
            "how the source was made is not shown"
        ]
    return [*report.history, summary_of(report)], []
