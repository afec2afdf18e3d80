"""Where the bytes of an output are, as a treemap: the area is the bytes, the shade the bits per weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compressor.report.numbers import bytes_text, percent, significant
from compressor.report.plot_labels import HEIGHT, RISE, text_width
from compressor.report.plots import bar, picture, text
from compressor.report.schema import GROUPS, LINEARS, Layer, Report
from compressor.report.shades import Shade, bits_css, bits_legend
from compressor.report.treemap import Rect, in_rows, squarify

CELLS = 420  # cells for blocks in all; with more, neighbouring blocks share a cell
HEAD = 17.0  # height of a heading
PAD = 4.0


@dataclass(frozen=True)
class Node:
    """Something that takes bytes: a group, a kind of matrix, one or some blocks of it.

    Attributes:
        name: what it is called in full; ``short`` where room is scarce, the first that fits.
        weights: source parameters it stands for; 0 for what holds none.
    """

    name: str
    short: tuple[str, ...]
    bytes: int
    weights: int
    parts: tuple[Node, ...] = ()

    @property
    def bits(self) -> float | None:
        return 8 * self.bytes / self.weights if self.weights else None


@dataclass(frozen=True)
class Treemap:
    """The drawing in two widths, its legend, and the same as rows of a table."""

    broad: Markup
    slim: Markup
    legend: list[Shade]
    rows: list[Node]


def tree(report: Report) -> list[Node]:
    """The groups of the ledger by bytes; the decoder linears by kind, and these by block."""
    ledger = report.size.ledger
    found = []
    for group in GROUPS:
        rows = [row for row in ledger if row.group == group and group not in LINEARS]
        if count := sum(row.bytes for row in rows):
            weights = sum(row.parameters for row in rows)
            found.append(Node(group, (group, group.split(",")[0].split()[0]), count, weights))
    stored = [row for row in ledger if row.group in LINEARS]
    kinds = _kinds(report.layers)
    known = sum(kind.bytes for kind in kinds)
    if (rest := sum(row.bytes for row in stored) - known) > 0.001 * known and stored:
        new = report.linearization is not None  # else it is a factor that several matrices share
        name, short = ("new in linearized layers", "new") if new else ("shared by several of them", "shared")
        kinds.append(Node(name, (short,), rest, 0))
    if kinds:
        weights = sum(kind.weights for kind in kinds)
        name = "decoder linears"
        found.insert(0, Node(name, (name, "linears"), sum(kind.bytes for kind in kinds), weights, tuple(kinds)))
    return found


def _kinds(layers: Sequence[Layer]) -> list[Node]:
    groups: dict[str, dict[int, list[Layer]]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, {}).setdefault(layer.block, []).append(layer)
    together = max(1, math.ceil(sum(len(blocks) for blocks in groups.values()) / CELLS))
    nodes = []
    for kind, blocks in groups.items():
        order = sorted(blocks)
        runs = [order[i : i + together] for i in range(0, len(order), together)]
        parts = tuple(_blocks(kind, run, [layer for block in run for layer in blocks[block]]) for run in runs)
        name = _shortest(kind, list(groups))
        short = tuple(dict.fromkeys([name, name.removesuffix("_proj")]))
        nodes.append(Node(kind, short, *_sums([layer for found in blocks.values() for layer in found]), parts))
    return nodes


def _shortest(kind: str, others: Sequence[str]) -> str:
    """The end of a dotted path, as long as it must be to be told from the ends of the others."""
    path = kind.split(".")
    for parts in range(1, len(path)):
        end = ".".join(path[-parts:])
        if sum(other.endswith(f".{end}") for other in others) == 1:
            return end
    return kind


def _blocks(kind: str, blocks: Sequence[int], layers: Sequence[Layer]) -> Node:
    where = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}\u2013{blocks[-1]}"
    matrices = f", {len(layers)} matrices" if len(layers) > len(blocks) else ""
    name = f"{kind}, block{'s' if len(blocks) > 1 else ''} {where}{matrices}"
    return Node(name, (where,), *_sums(layers))


def _sums(layers: Sequence[Layer]) -> tuple[int, int]:
    return sum(layer.bytes for layer in layers), sum(layer.shape[0] * layer.shape[1] for layer in layers)


def told(node: Node) -> str:
    """``self_attn.q_proj, block 3: 1.2 MB, 4.25 bits per weight``."""
    bits = f", {significant(node.bits, 3)} bits per weight" if node.bits is not None else ""
    return f"{node.name}: {bytes_text(node.bytes)}{bits}"


def treemap(report: Report) -> Treemap | None:
    """The treemap of a report; ``None`` where nothing takes bytes."""
    nodes = tree(report)
    total = sum(node.bytes for node in nodes)
    if not total:
        return None
    shown = list(_leaves(nodes))
    rows = [part for node in nodes for part in (node, *node.parts)]
    words = f"{'; '.join(f'{told(node)} ({percent(node.bytes / total)})' for node in nodes)}."
    broad, slim = (
        picture(width, height, "Bytes of the output as areas", words, _draw(nodes, width, height, tips), f"map{key}")
        for key, width, height, tips in (("b", 960.0, 400.0, True), ("s", 400.0, 460.0, False))
    )
    return Treemap(broad, slim, bits_legend([node.bits for node in shown]), rows)


def _leaves(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        yield from _leaves(node.parts) if node.parts else (node,)


def _draw(nodes: Sequence[Node], width: float, height: float, tips: bool) -> list[str]:
    body: list[str] = []
    whole = Rect(0.0, 0.0, width, height)
    for node, rect in zip(nodes, squarify([node.bytes for node in nodes], whole), strict=True):
        if not node.parts:
            body += _cell(node, rect, tips)
            continue
        inside, heading = _headed(node, rect)
        body += heading
        for kind, place in zip(node.parts, squarify([part.bytes for part in node.parts], inside), strict=True):
            if len(kind.parts) < 2:
                body += _cell(kind, place, tips)
                continue
            room, heading = _headed(kind, place)
            body += heading
            for part, small in zip(kind.parts, in_rows([part.bytes for part in kind.parts], room), strict=True):
                body += _cell(part, small, tips)
    return body


def _headed(node: Node, rect: Rect) -> tuple[Rect, list[str]]:
    """What is left of ``rect`` for the parts, and its frame with a heading where one fits."""
    frame = bar(rect.x, rect.y, rect.width, rect.height, "frame", told(node))
    name = node.short[0]
    words = _fitting([f"{name}  {bytes_text(node.bytes)}", *node.short], rect.width - 2 * PAD)
    if not words or rect.height < 2.2 * HEAD:
        return rect.inset(1.0, 1.0), [frame]
    return rect.inset(HEAD, 1.5), [frame, text(rect.x + PAD, rect.y + 12.5, words, "heading")]


def _cell(node: Node, rect: Rect, tips: bool) -> list[str]:
    css = bits_css(node.bits)
    box = bar(rect.x, rect.y, rect.width, rect.height, f"{css} seam", told(node)) if tips else _plain(rect, css)
    words = _fitting(node.short, rect.width - 2 * PAD) if rect.height >= HEIGHT + 2 else ""
    if not words:
        return [box]
    out = [box, text(rect.x + PAD, rect.y + RISE + 3, words, f"on-{css}")]
    size = bytes_text(node.bytes)
    if rect.height >= 2 * HEIGHT + 5 and text_width(size) <= rect.width - 2 * PAD:
        out.append(text(rect.x + PAD, rect.y + RISE + 3 + HEIGHT, size, f"on-{css} thin"))
    return out


def _plain(rect: Rect, css: str) -> str:
    place = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
    return f'<rect {place} class="{css} seam"/>'


def _fitting(texts: Sequence[str], width: float) -> str:
    return next((words for words in texts if text_width(words) <= width), "")
