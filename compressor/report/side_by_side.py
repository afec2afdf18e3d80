"""Several runs side by side, as data for the page of ``compare --html``. Only what may be compared is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.report.comparison import Entry, Group
from compressor.report.differences import Marked, marked
from compressor.report.environment import plain
from compressor.report.footprint import stored_parameters
from compressor.report.kinds import Kind, kinds
from compressor.report.numbers import ABSENT, bytes_text, change, duration, percent, significant
from compressor.report.schema import EvaluationRow, Report
from compressor.report.schema_use import TaskResult
from compressor.report.sentences import row_of, what_was_done


@dataclass(frozen=True)
class Cell:
    """A figure as text; ``best`` of its row, where the row may be compared; ``more`` stands below it."""

    words: str
    more: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One figure of all runs."""

    name: str
    cells: list[Cell]
    note: str = ""


@dataclass(frozen=True)
class SampleRow:
    """One prompt: how the source goes on, and every run, marked against it; ``None`` where a run has no such sample."""

    prompt: str
    dense: str
    said: list[Marked | None]


def _row(name: str, values: Sequence[float | None], words: Any, *, note: str = "", judged: bool = True) -> Row:
    """Figures of which the least is the best, where they are ``judged`` at all and differ."""
    known = [value for value in values if value is not None]
    best = min(known) if judged and len(known) > 1 and min(known) < max(known) else None
    return Row(
        name, [Cell(ABSENT if v is None else words(v), best=best is not None and v == best) for v in values], note
    )


def figures(entries: Sequence[Entry]) -> list[Row]:
    """What was made of what, bytes, bits, time: all but quality. Only what comes from one model has a best."""
    one = len({_original(entry.report) for entry in entries if entry.report}) <= 1
    reports = [entry.report for entry in entries]

    def each(value: Any) -> list[Any]:
        return [None if report is None else value(report) for report in reports]

    def words(value: Any, name: str) -> Row:
        return Row(name, [Cell(ABSENT if found is None else found) for found in each(value)])

    first = entries[0].weight_bytes
    sizes = _row("weight files", [entry.weight_bytes for entry in entries], bytes_text, judged=one)
    more = [percent(entry.weight_bytes / first) if first else "" for entry in entries]
    told = [Cell(cell.words, f"{part} of the first", cell.best) for cell, part in zip(sizes.cells, more, strict=True)]
    rows = [
        words(lambda report: report.model.source, "made from"),
        words(what_was_done, "by"),
        Row(sizes.name, told),
        _row("whole folder", [entry.disk_bytes for entry in entries], bytes_text, judged=one),
        _row("bits per weight, linears", [e.bits_linears for e in entries], lambda v: significant(v, 3), judged=one),
        _row("bits per weight, model", [e.bits_model for e in entries], lambda v: significant(v, 3), judged=one),
        _row("parameters", each(_parameters), lambda count: f"{count:,}", judged=False),
        words(_calibrated, "calibrated on"),
        words(_checked, "reloaded and reproduced"),
        words(lambda report: report.baseline.verdict if report.baseline else ABSENT, "plain rounding"),
        _row("time of the run", each(lambda r: r.tool.seconds), duration, judged=False),
        _row("peak memory", each(lambda r: r.memory.peak_rss_bytes if r.memory else None), bytes_text, judged=False),
        words(lambda report: report.tool.version, "compressor"),
    ]
    return [row for row in rows if any(cell.words != ABSENT for cell in row.cells)]


def _calibrated(report: Report) -> str:
    data = report.calibration
    if data is None:
        return "nothing"
    names = ", ".join(str(source.get("name") or source.get("spec") or plain(source)) for source in data.sources)
    return f"{data.tokens:,} tokens of {names}"


def _parameters(report: Report) -> int | None:
    """Those that the folder stores; of an export only its bytes are known."""
    return stored_parameters(report)[1] if report.exported is None and report.size.ledger else None


def _checked(report: Report) -> str:
    check = report.verification
    return "not checked" if check is None else "yes" if check.passed else "NO"


def group_names(groups: Sequence[Group]) -> list[str]:
    """Names of texts; where several were measured in different ways, with what tells them apart."""
    names = [group.name for group in groups]
    long = [_with_windows(group) if names.count(group.name) > 1 else group.name for group in groups]
    return [
        f"{name}, tokens {group.tokens_sha256[:8]}" if long.count(name) > 1 and group.tokens_sha256 else name
        for name, group in zip(long, groups, strict=True)
    ]


def _with_windows(group: Group) -> str:
    length, count = group.protocol.get("seqlen"), group.protocol.get("windows")
    told = [f"{count} windows" if count else "", f"of {length} tokens" if length else ""]
    return f"{group.name}, {' '.join(filter(None, told))}" if any(told) else group.name


def quality(entries: Sequence[Entry], groups: Sequence[Group]) -> list[Row]:
    """Perplexity, KL and agreement, rows for each text as it was measured: other windows are other rows."""
    rows = []
    for name, group in zip(group_names(groups), groups, strict=True):
        ours = {line.entry: line.row for line in group.lines if line.row.who == "compressed"}
        found = [ours.get(entry.label) for entry in entries]
        dense = [_dense_of(entry, row) for entry, row in zip(entries, found, strict=True)]
        row = _row(f"perplexity, {name}", [r.perplexity if r else None for r in found], significant)
        cells = [
            Cell(cell.words, f"{change(r.perplexity, d)} to dense" if r and d is not None else "", cell.best)
            for cell, r, d in zip(row.cells, found, dense, strict=True)
        ]
        rows.append(Row(row.name, cells, "; ".join(group.doubts)))
        one = len({value for value in dense if value is not None}) <= 1
        rows.append(_row("KL", [r.kl if r else None for r in found], lambda v: significant(v, 3), judged=one))
        agreed = [r.top1 if r else None for r in found]
        rows.append(_greatest(_row("same first choice as dense", agreed, percent, judged=False), agreed, judged=one))
    return rows


def _dense_of(entry: Entry, row: EvaluationRow | None) -> float | None:
    """The perplexity of the dense model in the measurement that ``row`` is of."""
    for text in entry.report.evaluation if entry.report and row else []:
        dense = row_of(text, "dense")
        if dense is not None and any(each is row for each in text.rows):
            return dense.perplexity
    return None


def _greatest(row: Row, values: Sequence[float | None], *, judged: bool) -> Row:
    known = [value for value in values if value is not None]
    best = max(known) if judged and len(known) > 1 and max(known) > min(known) else None
    cells = [
        Cell(cell.words, cell.more, best is not None and v == best) for cell, v in zip(row.cells, values, strict=True)
    ]
    return Row(row.name, cells, row.note)


def tasks(entries: Sequence[Entry]) -> list[Row]:
    """Results of the harness. Rows are one only with the same questions, shots and version of the harness."""
    found: dict[tuple[Any, ...], dict[str, TaskResult]] = {}
    for entry in entries:
        for task in entry.report.tasks if entry.report else []:
            key = (task.task, task.metric, task.shots, task.harness, task.samples, task.tokens_sha256)
            found.setdefault(key, {})[entry.label] = task
    rows = []
    for (name, metric, shots, harness, samples, _), results in found.items():
        values = [results[entry.label].value if entry.label in results else None for entry in entries]
        note = f"{ABSENT if shots is None else shots} shots, {samples:,} answered, lm-eval {harness}"
        row = _row(f"{name}, {metric}", values, lambda v: significant(v, 3), note=note, judged=False)
        cells = []
        for entry, cell in zip(entries, row.cells, strict=True):
            result = results.get(entry.label)
            error = f"± {significant(result.stderr, 2)}" if result and result.stderr is not None else ""
            before = "before the export" if result and result.before_export else ""
            cells.append(Cell(cell.words, ", ".join(filter(None, (error, before)))))
        judged = _greatest(Row(row.name, cells, note), values, judged=metric.startswith(("acc", "exact_match")))
        rows.append(judged)
    return rows


def settings_that_differ(entries: Sequence[Entry]) -> list[Row]:
    """The leaves of the recipes that are not the same in all runs with a report."""
    leaves = [_leaves(entry.report.recipe) if entry.report else {} for entry in entries]
    names = list(dict.fromkeys(name for some in leaves for name in some))
    with_report = [some for some, entry in zip(leaves, entries, strict=True) if entry.report]
    differing = [name for name in names if len({some.get(name, ABSENT) for some in with_report}) > 1]
    return [Row(name, [Cell(some.get(name, ABSENT)) for some in leaves]) for name in differing]


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {
            k: v for key, entry in value.items() for k, v in _leaves(entry, f"{path}.{key}" if path else key).items()
        }
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return {k: v for i, entry in enumerate(value, 1) for k, v in _leaves(entry, f"{path}.{i}").items()}
    return {path: plain(value) or ABSENT}


def by_kind(entries: Sequence[Entry]) -> list[tuple[str, list[Kind | None]]]:
    """The summaries of each kind of matrix, run by run."""
    summaries = [{kind.name: kind for kind in kinds(entry.report.layers)} if entry.report else {} for entry in entries]
    names = list(dict.fromkeys(name for some in summaries for name in some))
    return [(name, [some.get(name) for some in summaries]) for name in names]


def sample_rows(entries: Sequence[Entry]) -> list[SampleRow]:
    """Samples with the same prompt and the same answer of the source, in the order of the first run that has them."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for entry in entries:
        for sample in entry.report.samples if entry.report else []:
            if sample.dense is not None:
                found.setdefault((sample.prompt, sample.dense), {})[entry.label] = sample.compressed
    return [
        SampleRow(
            prompt,
            dense,
            [marked(dense, said[entry.label]) if entry.label in said else None for entry in entries],
        )
        for (prompt, dense), said in found.items()
    ]


def cautions(entries: Sequence[Entry]) -> list[str]:
    """What must be known before anything is compared: other models, other vocabularies, no report."""
    reports = [entry.report for entry in entries if entry.report]
    told = []
    sources = list(dict.fromkeys(_original(report) for report in reports))
    if len(sources) > 1:
        told.append(f"made from different models: {', '.join(sources)}")
    vocabularies = list(dict.fromkeys(report.model.vocabulary for report in reports))
    if len(vocabularies) > 1:
        sizes = ", ".join(f"{size:,}" for size in vocabularies)
        told.append(f"vocabularies of different sizes ({sizes}): perplexities do not compare, bits per byte do")
    told += [f"{entry.label} has no report: only its size is known" for entry in entries if entry.report is None]
    return told


def _original(report: Report) -> str:
    return report.history[0].source if report.history else report.model.source
