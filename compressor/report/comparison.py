"""Several models side by side: sizes of all, quality only where protocol and tokens are the same."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.engine.checkpoint import EMBEDDED, resolve_model
from compressor.engine.hub_names import commit_of, parse_name
from compressor.errors import UserError
from compressor.report.card import WEIGHTS
from compressor.report.comparable import NOT_IDENTITY, comparable_key, token_hash
from compressor.report.contents import ABOUT, read_contents
from compressor.report.files import REPORT, read_report
from compressor.report.footprint import Footprint, footprint
from compressor.report.gguf_contents import gguf_in, read_gguf
from compressor.report.schema import LINEARS, EvaluationRow, Report

COUNTED = frozenset({"sha256", "tokens_in_text", "tokens_dropped"})
"""Keys that follow from others: of two measurements that differ in these, it is said that the tokens are others."""


@dataclass(frozen=True)
class Entry:
    """One model: its sizes, its report when there is one, and how it was named: a fetched one by its hub id."""

    label: str
    path: Path
    weight_bytes: int
    disk_bytes: int | None
    bits_linears: float | None
    bits_model: float | None
    source: str | None
    report: Report | None
    named: str = ""


@dataclass(frozen=True)
class Line:
    """One measurement: ``label`` for a reader, ``entry`` the model it belongs to, ``row`` as in that model's report."""

    label: str
    entry: str
    row: EvaluationRow


@dataclass
class Group:
    """Measurements that may be compared: one text, one protocol, the same tokens.

    Attributes:
        differs: why another group of the same text is not comparable with this one; empty when there is none.
        doubts: what else a reader must know before comparing.
    """

    name: str
    protocol: dict[str, Any]
    text_sha256: str
    tokens_sha256: str
    lines: list[Line] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Read what stands at each path: a ``report.json``, a model folder with or without one, or a hub id.

    Args:
        paths: two or more.

    Returns:
        For each its ``label``, ``weight_bytes``, ``bits_linears``, ``bits_model`` and ``report`` (None without one).

    Raises:
        UserError: fewer than two paths, one that is none of these, or a hub that cannot be reached.
    """
    if len(paths) < 2:
        raise UserError("compare needs at least two models", fix="name another folder or report.json")
    found = [_found(path) for path in paths]
    labels = _labels(paths, found)
    return [
        replace(_entry(path, label), named=str(given)) for given, path, label in zip(paths, found, labels, strict=True)
    ]


def _found(path: Path) -> Path:
    """The path itself, or the folder of a model that is fetched from the hub."""
    here = path.expanduser()
    fetched = not here.exists() and parse_name(str(path)) is not None
    return resolve_model(str(path)) if fetched else here


def _labels(paths: Sequence[Path], found: Sequence[Path]) -> list[str]:
    """Folder names, or hub ids; with their parents where two are equal; numbered where that does not help either."""
    folders = [path.resolve().parent if path.suffix == ".json" else path.resolve() for path in found]
    short = [
        str(path) if commit_of(folder) is not None else folder.name for path, folder in zip(paths, folders, strict=True)
    ]
    counts = Counter(short)
    labels = [
        f"{folder.parent.name}/{name}" if counts[name] > 1 else name
        for folder, name in zip(folders, short, strict=True)
    ]
    again = Counter(labels)
    return [f"{label} #{i + 1}" if again[label] > 1 else label for i, label in enumerate(labels)]


def _entry(path: Path, label: str) -> Entry:
    if str(path) == EMBEDDED and not path.exists():
        path = resolve_model(EMBEDDED)
    if path.is_file():
        report = read_report(path)
        return _from_report(path, label, report, footprint(report))
    if not path.is_dir():
        raise UserError(f"{str(path)!r} does not exist", fix="give a model folder or a report.json")
    if not (path / REPORT).is_file():
        contents = read_contents(path) if (packed := gguf_in(path)) is None else read_gguf(packed)
        linears = contents.bits(*LINEARS)
        return Entry(
            label,
            path,
            contents.weight_bytes,
            contents.disk_bytes,
            linears,
            contents.bits(),
            path.resolve().name,
            None,
        )
    report = read_report(path)
    files = [file for file in path.iterdir() if file.is_file() and file.name not in ABOUT]
    weights = sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)
    disk, left = sum(file.stat().st_size for file in files), footprint(report)
    found = replace(left, weight_bytes=weights or left.weight_bytes, disk_bytes=disk or left.disk_bytes)
    return _from_report(path, label, report, found)


def _from_report(path: Path, label: str, report: Report, left: Footprint) -> Entry:
    return Entry(
        label,
        path,
        left.weight_bytes,
        left.disk_bytes,
        left.bits_linears,
        left.bits_model,
        report.model.source,
        report,
    )


def compare_texts(entries: Sequence[Entry]) -> list[Group]:
    """Group the measurements of all reports: what stands in one group may be compared.

    Args:
        entries: as `read_entries` gives them.

    Returns:
        Groups of one text, one protocol and the same tokens: ``name``, ``lines`` (each a ``label`` and a ``row``), and
        in ``differs`` and ``doubts`` what forbids to compare it with others, or should be known before.
    """
    groups: dict[str, Group] = {}
    dense_of: dict[str, set[tuple[str | None, float]]] = {}
    for entry in entries:
        for text in entry.report.evaluation if entry.report else []:
            key = comparable_key(text)
            group = groups.setdefault(key, Group(text.name, text.protocol, text.text_sha256, token_hash(text)))
            for row in text.rows:
                if row.who == "dense":
                    known = dense_of.setdefault(key, set())
                    if (entry.source, row.perplexity) in known:
                        continue
                    known.add((entry.source, row.perplexity))
                group.lines.append(Line(_line_label(entry, row), entry.label, row))
            if text.in_domain:
                group.doubts.append(f"{entry.label} was calibrated on this kind of text: flattering")
            if entry.report and entry.report.exported and not entry.report.exported.exact:
                group.doubts.append(f"{entry.label} was measured before its export rounded some values once more")
            if not token_hash(text):
                group.doubts.append(f"{entry.label} recorded no hash of the tokens: the texts may differ")
    for key, group in groups.items():
        group.lines.sort(key=lambda line: line.row.who != "dense")
        if len(dense_of.get(key, ())) > 1:
            group.doubts.append("KL and agreement are against different dense models, and do not compare")
    _mark_differences(list(groups.values()))
    names = list(dict.fromkeys(group.name for group in groups.values()))
    return sorted(groups.values(), key=lambda group: names.index(group.name))


def _line_label(entry: Entry, row: EvaluationRow) -> str:
    if row.who == "dense":
        return f"dense: {entry.source}"
    return entry.label if row.who == "compressed" else f"baseline of {entry.label}: {row.label}"


def _mark_differences(groups: Sequence[Group]) -> None:
    for group in groups:
        group.differs = _reasons(group, [other for other in groups if other is not group and _same_text(group, other)])


def _reasons(group: Group, others: Sequence[Group]) -> list[str]:
    """Why none of ``others`` may stand beside it: setting by setting its own value and theirs, then the text."""
    theirs: dict[str, list[str]] = {}
    words = []
    for other in others:
        keys = sorted((set(group.protocol) | set(other.protocol)) - NOT_IDENTITY - COUNTED)
        changed = [key for key in keys if group.protocol.get(key) != other.protocol.get(key)]
        for key in changed:
            theirs.setdefault(key, []).append(str(other.protocol.get(key)))
        if group.text_sha256 != other.text_sha256:
            words.append("another text of this name")
        elif group.tokens_sha256 != other.tokens_sha256:
            words.append("other tokens")
        elif not changed:
            words.append("another evaluation")
    values = [f"{key} {group.protocol.get(key)} / {', '.join(dict.fromkeys(found))}" for key, found in theirs.items()]
    return values + list(dict.fromkeys(words))


def _same_text(one: Group, other: Group) -> bool:
    return one.name == other.name or bool(one.text_sha256 and one.text_sha256 == other.text_sha256)


def missing_commands(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """For each model without any measurement, the command that makes one."""
    sources = [entry.source for entry in entries if entry.report and entry.source]
    base = sources[0] if sources else "BASE"
    commands = []
    for entry in entries:
        if not (entry.report and entry.report.evaluation) and gguf_in(entry.path) is None:  # which we do not run
            against = (entry.source if entry.report else base) or base
            itself = against == entry.label
            words = [
                "compressor",
                "evaluate",
                entry.named or str(entry.path),
                *([] if itself else ["--against", against]),
            ]
            commands.append((entry.label, shlex.join(words)))
    return commands
