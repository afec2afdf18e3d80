"""Hand-made SVG for the report. Colours are CSS classes, so that one drawing serves light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from compressor.report.numbers import bytes_text, change, percent, significant
from compressor.report.schema import GROUPS, Evaluation, LedgerRow, Size
from compressor.report.sentences import row_of

FILES = "config, tokenizer, reader"


@dataclass(frozen=True)
class Panel:
    """One small drawing with its caption; ``wide`` ones take a whole row of the page."""

    caption: str
    svg: Markup
    wide: bool = False


def picture(width: float, height: float, title: str, description: str, body: Sequence[str], key: str) -> Markup:
    """An inline SVG with title and description for those who cannot see it; ``key`` is unique in the page."""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """A line of text; ``y`` is its baseline."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, css: str, tip: str) -> str:
    """A rectangle with a tooltip."""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}" class="{css}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def round_ticks(largest: float, wanted: int = 5) -> list[float]:
    """About ``wanted`` round steps (1, 2 or 5 times a power of ten) from 0 up to ``largest``."""
    if not largest > 0:
        return [0.0]
    raw = largest / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [index * step for index in range(int(largest / step * 1.0001) + 1)]


def ledger_plot(size: Size, width: float = 960.0) -> Markup:
    """Two stacked bars on one scale: the source's weight files above, the output's below, by group of the ledger."""
    left, right, height = 62.0, width - 60, 34.0
    ledger = [row for row in size.ledger if row.group != FILES]
    known = all(row.source_bytes is not None for row in ledger)
    before = _by_group(ledger, source=True) if known else {"source": size.source_bytes}
    after = _by_group(ledger, source=False)
    total_before, total_after = sum(before.values()), sum(after.values())
    largest = max(total_before, total_after, 1)
    scale = (right - left) / largest
    body: list[str] = []
    for tick in round_ticks(largest, 5 if width > 600 else 2):
        x = left + tick * scale
        body += [line(x, 8, x, 104, "grid"), text(x, 119, bytes_text(round(tick)), "tick", "middle")]
    for y, word, parts in ((14.0, "source", before), (62.0, "output", after)):
        total = sum(parts.values())
        body.append(text(left - 8, y + 22, word, "label", "end"))
        x = left
        for group, count in parts.items():
            length = count * scale
            css = f"g{GROUPS.index(group)}" if group in GROUPS else "dense"
            body.append(bar(x, y, length, height, f"{css} seam", f"{word}: {group}, {bytes_text(count)}"))
            if length > 62:
                body.append(text(x + length / 2, y + 22, bytes_text(count), f"on-{css}", "middle"))
            x += length
        share = f", {percent(total / total_before)}" if word == "output" and total_before else ""
        inside = x + 150 > right + 60
        if not inside:
            body.append(text(x + 8, y + 22, f"{bytes_text(total)}{share}", "value"))
    description = (
        "; ".join(f"{group} {bytes_text(count)}" for group, count in after.items())
        + f". Source {bytes_text(total_before)}, output {bytes_text(total_after)}."
    )
    title = "Bytes of the weight files of the source and of the output"
    return picture(width, 126, title, description, body, f"ledger{width:.0f}")


def _by_group(rows: Sequence[LedgerRow], *, source: bool) -> dict[str, int]:
    sums: dict[str, int] = {}
    for group in GROUPS:
        count = sum((row.source_bytes or 0) if source else row.bytes for row in rows if row.group == group)
        if count:
            sums[group] = count
    return sums


def perplexity_panels(evaluation: Sequence[Evaluation], cap: float = 4.0) -> list[Panel]:
    """One panel a text: perplexity of dense, compressed and baseline from zero; bars beyond ``cap`` x dense break."""
    return [
        Panel(f"{entry.name}{' (in-domain)' if entry.in_domain else ''}", _perplexity(entry, index, cap))
        for index, entry in enumerate(evaluation)
    ]


def _perplexity(entry: Evaluation, index: int, cap: float) -> Markup:
    left, right, pitch = 82.0, 238.0, 27.0
    dense = row_of(entry, "dense")
    finite = [row.perplexity for row in entry.rows if math.isfinite(row.perplexity)]
    largest = max(finite, default=1.0)
    if dense is not None and math.isfinite(dense.perplexity):
        largest = min(largest, cap * dense.perplexity)
    scale = (right - left) / largest if largest > 0 else 0.0
    body, told = [line(left, 0, left, pitch * len(entry.rows), "axis")], []
    for place, row in enumerate(entry.rows):
        y = place * pitch + 4
        value = row.perplexity
        broken = not value <= largest
        width = (right - left) if broken else value * scale
        words = significant(value, 4)
        if dense is not None and row is not dense:
            words += f" ({change(value, dense.perplexity)})"
        told.append(f"{row.who} {words}")
        body.append(text(left - 6, y + 14, row.who, "label", "end"))
        body.append(bar(left, y, width, pitch - 8, row.who, f"{row.label}: perplexity {words}"))
        if broken:
            x = right - 14
            body += [line(x + d, y + pitch - 6, x + d + 5, y - 2, "gap") for d in (0.0, 4.0)]
        elif row.nll_per_window_stderr:
            low, high = (value * math.exp(sign * row.nll_per_window_stderr) * scale + left for sign in (-1, 1))
            body.append(line(low, y + (pitch - 8) / 2, min(high, right + 6), y + (pitch - 8) / 2, "whisker"))
        body.append(text(max(left + width, left) + 9, y + 14, words, "value"))
    title = f"Perplexity on {entry.name}"
    return picture(360, pitch * len(entry.rows), title, "; ".join(told), body, f"ppl{index}")
