"""The model card: front matter, inheritance, hostile names, both ways of loading."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from compressor.report.card import front_matter_of, model_card
from compressor.report.environment import markdown
from compressor.report.schema import Report

Make = Callable[..., Report]


def front_of(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    assert found
    content: dict[str, Any] = yaml.safe_load(found.group(1))
    return content


def test_front_matter(make_report: Make) -> None:
    source = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [chat]\n---\n# Source\n"
    front = front_of(model_card(make_report(), source))
    assert front == {
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "toy",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compressor", "pruned", "sparse", "sparsegpt"],
    }


def test_no_licence_is_invented(make_report: Make) -> None:
    for source in (None, "# no front matter", "---\n: [broken\n---\n", "---\n- a list\n---\n"):
        card = model_card(make_report(), source)
        assert "license" not in front_of(card)
        assert "The licence of the source model applies" in card


def test_front_matter_survives_windows_line_ends() -> None:
    assert front_matter_of("---\r\nlicense: mit\r\n---\r\ntext") == {"license": "mit"}


def test_a_source_that_is_no_hub_name_is_no_base_model(make_report: Make) -> None:
    report = make_report()
    report.model.source = "my model: v2\n---\nlicense: mit"
    front = front_of(model_card(report, None))
    assert "base_model" not in front
    assert "license" not in front


def test_both_ways_of_loading(make_report: Make) -> None:
    card = model_card(make_report(), None)
    assert "import compressor" in card
    assert "trust_remote_code=True" in card
    assert "What cannot load it" in card
    report = make_report()
    for layer in report.layers:
        layer.format = "bfloat16"
    plain = model_card(report, None)
    assert "trust_remote_code" not in plain
    assert "no smaller than the source" in plain


def test_the_recipe_in_the_card_is_the_recipe(make_report: Make) -> None:
    report = make_report()
    report.recipe["note"] = "```\nnot the end"
    card = model_card(report, None)
    found = re.search(r"^(`{3,})yaml\n(.*?)^\1$", card, flags=re.DOTALL | re.MULTILINE)
    assert found
    assert yaml.safe_load(found.group(2)) == report.recipe


def test_tables_have_as_many_cells_as_headers(make_report: Make) -> None:
    report = make_report()
    report.evaluation[0].name = "a|b\n<script>"
    report.evaluation[0].rows[1].label = "x | y"
    report.size.ledger[0].format = "bit|mask"
    card = model_card(report, None)
    assert "<script>" not in card
    widths = []
    for line in card.splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)) - 1)
    assert sorted(set(widths)) == [3, 6, 7]
    assert widths == sorted(widths), "three tables, one after the other"
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 4) + (2 + 2) + (2 + 3)


def test_markdown_is_one_harmless_line() -> None:
    assert markdown("a_b *c*\n`d` <i>&") == r"a\_b \*c\* \`d\` \<i\>&amp;"
