"""The page: well-formed, self-contained, escaped, and nothing in the schema is left unsaid."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from compressor.report.html import render_html, shown_experts, shown_layers
from compressor.report.schema import Expert, Layer, Report

Make = Callable[..., Report]
VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "</td><script>alert(1)</script>\"'&<b>"


class Strict(HTMLParser):
    """Checks that every element is closed in order, and collects what could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag


def parse(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("linearized", [False, True])
def test_well_formed_and_loads_nothing(make_report: Make, linearized: bool) -> None:
    page = render_html(make_report(linearized=linearized))
    parser = parse(page)
    assert not parser.seen & {"script", "link", "img", "iframe", "object", "embed"}
    for tag, name, value in parser.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"href", "src", "action", "xlink:href"}:
            assert value is not None
            assert value.startswith("#"), (tag, name, value)
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.parametrize("linearized", [False, True])
def test_ids_are_unique_and_links_lead_somewhere(make_report: Make, linearized: bool) -> None:
    parser = parse(render_html(make_report(linearized=linearized)))
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in parser.attributes if name == "href" and value}
    assert targets <= set(ids)
    for _, name, value in parser.attributes:
        if name == "aria-labelledby" and value:
            assert set(value.split()) <= set(ids)


@pytest.mark.parametrize("linearized", [False, True])
def test_links_stand_in_the_order_of_the_sections(make_report: Make, linearized: bool) -> None:
    page = render_html(make_report(linearized=linearized))
    links = re.findall(r'href="#([a-z]+)"', page[page.index("<nav") : page.index("</nav>")])
    assert links == re.findall(r'<section id="([a-z]+)"', page[page.index("</nav>") :])


def test_nothing_is_said_of_zeros_and_errors_where_there_are_none(make_report: Make) -> None:
    """As in a linearized model, whose matrices are those of the source."""
    report = make_report()
    page = render_html(report)
    assert all(words in page for words in ("Sparsity as bars", "Sparsity: ", "Median error", "Relative error as bars"))
    report.stages = []
    for layer in report.layers:
        layer.sparsity, layer.relative_error = 0.0, None
    page = render_html(report)
    layers = page[page.index('<section id="layers"') : page.index('<section id="calibration"')]
    assert not any(words in layers for words in ("Sparsity as bars", "Sparsity: ", "Median error", "as bars"))


def test_every_header_cell_has_a_scope(make_report: Make) -> None:
    page = render_html(make_report())
    assert all('scope="' in cell for cell in re.findall(r"<th\b[^>]*>", page))
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    # in two widths: ledger, treemap, maps of errors and sparsity (bits are the same in all), chain; once: one text, and
    # error and sparsity of two kinds as bars
    assert len(pictures) == 2 * 5 + 5
    assert all(re.search(r"<title id=[^>]*>[^<]+</title><desc id=[^>]*>[^<]+</desc>", picture) for picture in pictures)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all scalars."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from leaves(entry, (*path, index))
    elif value is not None:
        yield path


OTHERS = {
    "passed": False,
    "mode": "block by block",
    "group": "embeddings",
    "component": "N-LRC",
    "activations": "exact",
    "language": "shell",
}
LITERALS = {"who", "mode", "group", "component", "activations", "language"}
NOT_SHOWN = {"schema_version", "who"}  # of one value only; and: another 'who' is another kind of row


def altered(path: tuple[Any, ...], value: Any) -> Any:
    if path[-1] in OTHERS:
        return OTHERS[path[-1]]
    if path[-1] == "stage":
        return 5 - value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if path[-1] in {"block", "blocks"} else 2 * value + 123
    if isinstance(value, float):
        return value * 0.7
    return f"zq {value} qz"


def test_every_field_is_shown(make_report: Make) -> None:
    """Change any one number or word of the report, and the page changes; words stand in it literally."""
    content = make_report(blocks=1, linearized=True, exported=True).model_dump()
    assert not [key for key, value in content.items() if value in (None, [], {})], "the sample must fill everything"
    fields = {
        name for definition in (Report.model_json_schema()["$defs"]).values() for name in definition["properties"]
    }
    reached = {step for path in leaves(content) for step in path if isinstance(step, str)}
    assert fields <= reached, f"the sample leaves out {fields - reached}"
    before = render_html(Report.model_validate(content))
    for path in leaves(content):
        if path[-1] in NOT_SHOWN:
            continue
        changed = copy.deepcopy(content)
        parent = changed
        for step in path[:-1]:
            if isinstance(parent[step], tuple):
                parent[step] = list(parent[step])
            parent = parent[step]
        parent[path[-1]] = altered(path, parent[path[-1]])
        page = render_html(Report.model_validate(changed))
        assert page != before, f"{'.'.join(map(str, path))} is nowhere on the page"
        if isinstance(parent[path[-1]], str) and path[-1] not in OTHERS:
            words = re.sub(r"</?mark[^>]*>", "", page).replace("&gt;", ">")
            assert parent[path[-1]] in words, path


def test_hostile_names_are_escaped(make_report: Make) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: entry if key in LITERALS else poison(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return HOSTILE if isinstance(value, str) else value

    content = poison(make_report(linearized=True, exported=True).model_dump())
    content["versions"] = {HOSTILE: HOSTILE}
    content["machine"] = {HOSTILE: HOSTILE}
    content["recipe"] = {HOSTILE: [HOSTILE]}
    page = render_html(Report.model_validate(content))
    parser = parse(page)
    assert "script" not in parser.seen
    assert "<script" not in page
    assert "b" not in parser.seen


@pytest.mark.parametrize("blocks", [0, 1, 120, 300])
def test_any_number_of_layers(make_report: Make, blocks: int) -> None:
    page = render_html(make_report(blocks=blocks))
    parse(page)
    for _, name, value in re.findall(r'<(rect|line) [^>]*?(width|height)="([^"]*)"', page):
        assert float(value) >= 0, name
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower().replace("dominant", "")


def test_bare_report(make_report: Make) -> None:
    report = make_report(blocks=1)
    keep = {"tool", "model", "recipe", "size", "layers"}
    page = render_html(Report.model_validate({k: v for k, v in report.model_dump().items() if k in keep}))
    parse(page)
    assert "Quality was not measured" in page
    assert "the run was data-free" in page
    assert "nobody has loaded this folder yet" in page


def test_perplexities_beyond_all_bounds(make_report: Make) -> None:
    report = make_report()
    for row, value in zip(report.evaluation[0].rows, (math.inf, math.nan, 1e30), strict=True):
        row.perplexity = value
    report.layers[0].relative_error = math.inf
    report.layers[1].relative_error = 0.0
    report.layers[2].relative_error = 1e-14
    parse(render_html(report))


def test_failed_verification_is_said_first(make_report: Make) -> None:
    report = make_report()
    assert report.verification is not None
    report.verification.passed = False
    page = render_html(report)
    assert page.index("Do not use this model") < page.index("Against plain rounding")
    assert page.index("something else was done than asked") < page.index("Size ledger")
    assert page.index("the disk is nearly full") < page.index("Size ledger")


def test_thousands_of_layers_keep_the_worst_and_the_odd(make_report: Make) -> None:
    sample = make_report().layers[1]
    layers = [sample.model_copy(update={"name": f"l{i}", "relative_error": i / 5000}) for i in range(5000)]
    layers[3] = layers[3].model_copy(update={"fallback": "data-free"})
    shown = shown_layers(layers, limit=1000, worst=300)
    assert [layer.name for layer in shown] == ["l3", *(f"l{i}" for i in range(4700, 5000))]
    experts = [Expert(module="m", expert=i, tokens=9000 - i) for i in range(5000)]
    experts[2] = experts[2].model_copy(update={"fallback": "data-free"})
    assert [expert.expert for expert in shown_experts(experts)] == [2, *range(4700, 5000)]
    few: list[Layer] = layers[:1000]
    assert shown_layers(few, limit=1000) is few
