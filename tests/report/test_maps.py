"""Treemaps and maps of layers: the geometry holds, shades mean what the legend says, and sizes add up."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence

import pytest
from large_reports import large

from compressor.report.plot_heat import BITS, ERROR, SPARSITY, cells, heat_map, scale_of
from compressor.report.plot_treemap import CELLS, tree, treemap
from compressor.report.schema import Report
from compressor.report.shades import BITS_EDGES, NONE, bits_css, bits_legend, even_scale
from compressor.report.treemap import Rect, in_rows, squarify

Make = Callable[..., Report]
Fill = Callable[[Sequence[float], Rect], list[Rect]]


def overlap(one: Rect, other: Rect) -> float:
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    return max(0.0, width) * max(0.0, height)


@pytest.mark.parametrize("fill", [squarify, in_rows])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 100])
@pytest.mark.parametrize("shape", [(960.0, 400.0), (100.0, 700.0)])
def test_areas_are_as_the_sizes_and_fill_the_rectangle(fill: Fill, count: int, shape: tuple[float, float]) -> None:
    chance = random.Random(count)
    sizes = [chance.choice([1.0, 1.0, 5.0, 80.0, 1e-3]) * chance.random() for _ in range(count)]
    into = Rect(3.0, 5.0, *shape)
    placed = fill(sizes, into)
    for size, rect in zip(sizes, placed, strict=True):
        assert rect.area == pytest.approx(into.area * size / sum(sizes), rel=1e-6, abs=1e-6)
        assert rect.x >= into.x - 1e-6 and rect.x + rect.width <= into.x + into.width + 1e-6
        assert rect.y >= into.y - 1e-6 and rect.y + rect.height <= into.y + into.height + 1e-6
    assert sum(rect.area for rect in placed) == pytest.approx(into.area)
    assert sum(overlap(a, b) for a, b in itertools.combinations(placed, 2)) < 1e-6 * into.area


@pytest.mark.parametrize("fill", [squarify, in_rows])
def test_nothing_takes_no_area(fill: Fill) -> None:
    assert fill([], Rect(0, 0, 10, 10)) == []
    assert [rect.area for rect in fill([0.0, 0.0], Rect(0, 0, 10, 10))] == [0, 0]
    assert sorted(rect.area for rect in fill([0.0, 2.0], Rect(0, 0, 10, 10))) == pytest.approx([0, 100])
    assert all(rect.area == 0 for rect in fill([1.0, 2.0], Rect(0, 0, 0, 10)))


def test_equal_sizes_come_out_about_square() -> None:
    for rect in squarify([1.0] * 12, Rect(0, 0, 400, 300)):
        assert max(rect.width / rect.height, rect.height / rect.width) < 1.4


def test_rows_keep_their_order() -> None:
    placed = in_rows([1.0] * 32, Rect(0, 0, 400, 200))
    assert placed == sorted(placed, key=lambda rect: (rect.y, rect.x))


def test_every_byte_of_the_folder_is_in_the_tree(make_report: Make) -> None:
    report = large(make_report(2))
    nodes = tree(report)
    assert sum(node.bytes for node in nodes) == sum(row.bytes for row in report.size.ledger)
    assert sum(part.bytes for part in nodes[0].parts) == nodes[0].bytes
    for kind in nodes[0].parts:
        assert sum(part.bytes for part in kind.parts) == kind.bytes
    assert [node.name for node in nodes[:2]] == ["decoder linears", "embeddings"]


def test_bytes_that_no_layer_has_are_shown(make_report: Make) -> None:
    report = large(make_report(2))
    report.size.ledger[0].bytes += 50_000_000
    nodes = tree(report)
    assert [part.bytes for part in nodes[0].parts if part.name == "shared by several of them"] == [50_000_000]


def test_many_blocks_share_cells(make_report: Make) -> None:
    found = tree(large(make_report(2), blocks=126))[0].parts
    assert sum(len(kind.parts) for kind in found) <= CELLS + len(found)
    assert found[0].parts[0].name == "self_attn.q_proj, blocks 0\u20132"
    experts = tree(large(make_report(2), blocks=4, experts=8))[0].parts
    assert experts[4].parts[1].name == "mlp.experts.*.gate_proj, block 1, 8 matrices"


def test_short_names_are_unambiguous(make_report: Make) -> None:
    report = large(make_report(2), blocks=2)
    twin = report.layers[0].model_copy(update={"kind": "cross_attn.q_proj", "name": "cross"})
    names = {
        part.name: part.short[0] for part in tree(report.model_copy(update={"layers": [*report.layers, twin]}))[0].parts
    }
    assert names["self_attn.q_proj"] == "self_attn.q_proj"
    assert names["cross_attn.q_proj"] == "cross_attn.q_proj"
    assert names["mlp.up_proj"] == "up_proj"


def test_the_treemap_tells_what_it_shows(make_report: Make) -> None:
    report = large(make_report(2))
    drawn = treemap(report)
    assert drawn is not None
    for words in ("self_attn.q_proj, block 31: 8.91", "4.25 bits per weight", "embeddings: 2.10"):
        assert words in drawn.broad
    assert {shade.css for shade in drawn.legend} == {"h2", "h3", "h5", "h7", NONE}
    bare = report.model_copy(update={"layers": [], "size": report.size.model_copy(update={"ledger": []})})
    assert treemap(bare) is None


def test_shades_of_bits() -> None:
    assert [bits_css(bits) for bits in (None, 1.0, 2.1, 4.25, 8.5, 16.0, 32.0)] == [
        NONE, "h0", "h1", "h3", "h5", "h7", "h8",
    ]  # fmt: skip
    every = [*BITS_EDGES, 32.0]
    assert [shade.css for shade in bits_legend(every)] == [f"h{i}" for i in range(9)]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_even_scale(logarithmic: bool) -> None:
    values = [1e-4 * 3**i for i in range(8)]
    scale = even_scale(values, str, logarithmic=logarithmic)
    steps = [int(scale.css(value)[1:]) for value in values]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 8)
    assert len(set(steps)) == 8 if logarithmic else len(set(steps)) < 6
    assert scale.css(None) == NONE == scale.css(float("nan"))
    assert scale.css(float("inf")) == "h8"
    assert scale.css(0.0) == "h0"


def test_a_map_has_a_cell_for_every_kind_and_block(make_report: Make) -> None:
    report = large(make_report(2), blocks=6)
    drawn = heat_map(report.layers, ERROR)
    assert drawn is not None and drawn.broad is not None and drawn.slim is not None
    assert len(re.findall("<rect", drawn.broad)) == len(re.findall("<rect", drawn.slim)) == 7 * 6
    assert drawn.numbers
    worst = max(report.layers, key=lambda layer: layer.relative_error or 0)
    (tip,) = re.findall(rf'class="(\S+)"><title>{re.escape(worst.kind)}, block {worst.block}: ', drawn.broad)
    assert tip == "h8"


def test_experts_are_shown_by_their_median(make_report: Make) -> None:
    report = large(make_report(2), blocks=2, experts=4)
    values = cells(report.layers, ERROR)["mlp.experts.*.up_proj"][1]
    assert len(values) == 4
    drawn = heat_map(report.layers, ERROR)
    assert drawn is not None and drawn.broad is not None
    assert "mlp.experts.*.up_proj, block 1:" in drawn.broad and "(median of 4;" in drawn.broad


def test_what_is_the_same_everywhere_is_a_sentence(make_report: Make) -> None:
    report = make_report(4)
    drawn = heat_map(report.layers, BITS)
    assert drawn is not None and drawn.broad is None
    assert "the same in every layer: 9.00\u00a0bits" in drawn.summary
    for layer in report.layers:
        layer.relative_error = None
    assert heat_map(report.layers, ERROR) is None


def test_several_maps_share_one_scale(make_report: Make) -> None:
    low, high = make_report(3).layers, make_report(3).layers
    for layer in low:
        layer.sparsity = 0.1
    for layer in high:
        layer.sparsity = 0.9
    scale = scale_of([low, high], SPARSITY)
    assert (scale.css(0.1), scale.css(0.9)) == ("h0", "h8")
    drawn = heat_map(low, SPARSITY, scale=scale, key="0")
    assert drawn is not None and drawn.broad is not None and "h8" not in drawn.broad
