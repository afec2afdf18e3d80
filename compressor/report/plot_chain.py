"""Bytes against perplexity along a chain: from the original, step by step, to the model the page is about."""

from __future__ import annotations

import itertools
import math

from markupsafe import Markup, escape

from compressor.report.chain import Chain, Link
from compressor.report.numbers import bytes_text, change, significant, tick_bytes
from compressor.report.plot_axes import LOG_BYTES_FROM, span_axis
from compressor.report.plot_labels import ABOVE, AROUND, RIGHT, Box, Mark, Segment, place_labels, shortened
from compressor.report.plots import line, picture, text

WIDTHS = (("b", 860.0, 300.0, 34), ("s", 400.0, 320.0, 16))


def chain_plots(chain: Chain, index: int = 0) -> tuple[Markup, Markup] | None:
    """The drawing for a wide and for a narrow page; ``None`` where fewer than two models have a finite perplexity.

    Args:
        index: which of the chain's texts.
    """
    known = [link for link in chain.links if _perplexity(link, index) is not None]
    if len(known) < 2:
        return None
    broad, slim = (_draw(known, index, chain.told[index], *size) for size in WIDTHS)
    return broad, slim


def _perplexity(link: Link, index: int) -> float | None:
    score = link.scores[index]
    return score.row.perplexity if score is not None and math.isfinite(score.row.perplexity) else None


def _draw(links: list[Link], index: int, name: str, key: str, width: float, height: float, letters: int) -> Markup:
    values = [value for link in links if (value := _perplexity(link, index)) is not None]
    left, right, top, bottom = 54.0, width - 14, 30.0, height - 44
    x_axis, x_log = span_axis([link.bytes for link in links], tick_bytes, 7 if width > 500 else 4, LOG_BYTES_FROM)
    y_axis, y_log = span_axis(values, lambda tick: f"{tick:,.10g}", 5)
    places = [
        (left + x_axis.place(link.bytes) * (right - left), bottom - y_axis.place(value) * (bottom - top))
        for link, value in zip(links, values, strict=True)
    ]
    body = [text(4, 14, f"perplexity on {name}{', logarithmic' if y_log else ''}", "label")]
    for tick, words in y_axis.ticks:
        y = bottom - y_axis.place(tick) * (bottom - top)
        body += [line(left, y, right, y, "grid"), text(left - 6, y + 3.5, words, "tick", "end")]
    for tick, words in x_axis.ticks:
        x = left + x_axis.place(tick) * (right - left)
        body += [line(x, top, x, bottom, "grid"), text(x, bottom + 15, words, "tick", "middle")]
    body += [line(left, bottom, right, bottom, "axis"), line(left, top, left, bottom, "axis")]
    body.append(text(right, height - 8, f"bytes of the weight files{', logarithmic' if x_log else ''}", "label", "end"))
    steps: list[Segment] = []
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        steps += [(x1, y1, x2, y1), (x2, y1, x2, y2)]
    body += [line(*step, "step") for step in steps]
    names = shortened([link.name for link in links], letters)
    marks = [
        Mark(x, y, 5.5, (f"{link.number} {short}", str(link.number)), (ABOVE, RIGHT, *AROUND))
        for link, short, (x, y) in zip(links, names, places, strict=True)
    ]
    for link, value, (x, y) in zip(links, values, places, strict=True):
        css = "dense" if link.run is None else "compressed"
        tip = f"{link.number} {link.name}: {bytes_text(link.bytes)}, perplexity {significant(value)}"
        tip += f", {change(value, values[0])} against {links[0].name}" if link is not links[0] else ""
        body.append(f'<g><title>{escape(tip)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{css}"/></g>')
    for label in place_labels(marks, Box(left + 3, top + 1, right, bottom - 2), steps):
        if label is not None:
            body += [line(*label.leader, "leader")] if label.leader else []
            body.append(text(label.x, label.y, label.text, "name", label.anchor))
    told = "; ".join(
        f"{link.number} {link.name} {bytes_text(link.bytes)}, perplexity {significant(value)}"
        for link, value in zip(links, values, strict=True)
    )
    return picture(width, height, f"Bytes and perplexity along the chain, on {name}", told, body, f"chain{key}")
