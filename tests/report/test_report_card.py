"""The model card: front matter, inheritance, hostile names, both ways of loading."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from compressor.report.card import model_card
from compressor.report.card_front import front_matter_of, relation
from compressor.report.environment import markdown
from compressor.report.schema import Report
from compressor.report.schema_use import Exported, Runtime, TaskResult

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


def test_gating_and_more_are_inherited(make_report: Make) -> None:
    source = (
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\npipeline_tag: image-text-to-text\n"
        "extra_gated_heading: Sign\nextra_gated_fields:\n  Name: text\ntags: [chat]\nbase_model: org/older\n---\n"
    )
    front = front_of(model_card(make_report(), source))
    assert (front["license_name"], front["license_link"]) == ("own", "LICENSE")
    assert front["extra_gated_fields"] == {"Name": "text"} and front["extra_gated_heading"] == "Sign"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "base_model" not in front, "what a folder of somebody else was made from is not what this was made from"


@pytest.mark.parametrize(
    ("source", "card", "expected"),
    [
        ("org/name", "", "org/name"),
        ("embedded", "", None),
        ("pruned", "---\ntags: [compressor]\nbase_model: org/name\n---\n", "org/name"),
        ("org/pruned", "---\ntags: [compressor]\nbase_model: org/name\n---\n", "org/pruned"),
        ("pruned", "---\ntags: compressor\n---\n", None),
    ],
)
def test_the_base_model(source: str, card: str, expected: str | None, make_report: Make) -> None:
    report = make_report()
    report.model.source = source
    assert front_of(model_card(report, card)).get("base_model") == expected


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([{"prune": {"method": "wanda", "bits": None}}], None),
        ([{"prune": {"method": "sparsegpt", "bits": 4}}], "quantized"),
        ([{"quantize": {"method": "rtn"}}], "quantized"),
        ([{"prune": {"method": "wanda"}}, {"quantize": {"method": "gptq"}}], "quantized"),
        ([{"decompose": {"method": "svd"}}], None),
        ([{"decompose": {"method": "svd"}}, {"quantize": {"method": "gptq"}}], "quantized"),
    ],
)
def test_the_relation_to_it(stages: list[dict[str, Any]], expected: str | None, make_report: Make) -> None:
    report = make_report()
    report.recipe["stages"] = stages
    assert relation(report) == expected
    assert relation(make_report(linearized=True)) == "finetune"
    report.exported = Exported(form="gguf Q4_0", file_bytes=1, exact=False)
    assert relation(report) == "quantized"
    report.exported.exact = True
    assert relation(report) == expected
    assert "base_model_relation" not in front_of(model_card(report)), "without a base there is no relation to it"


def test_data_sets_of_the_hub_are_named(make_report: Make) -> None:
    report = make_report()
    assert report.calibration is not None
    report.calibration.sources = [{"hub": "allenai/c4"}, {"hub": None, "path": "x.txt"}, {"spec": "self"}]
    assert front_of(model_card(report))["datasets"] == ["allenai/c4"]


def test_only_what_was_tried_is_said_to_load_it(make_report: Make) -> None:
    report = make_report()
    ways = {
        "transformers + compressor": ("import compressor\nload('PATH')", True),
        "llama.cpp": ("llama-cli -m PATH", False),
    }
    report.runtimes = [
        Runtime(name=name, version="1", form="packed", command=text, check="logits", difference=0.5, passed=passed)
        for name, (text, passed) in ways.items()
    ]
    card = model_card(report)
    assert "```python\nimport compressor\nload('PATH')\n```" in card and "largest difference 0.5" in card
    assert "llama-cli" not in card and "Nobody has tried" not in card
    assert "What cannot load it" in card
    report.runtimes = []
    untried = model_card(report)
    assert "Nobody has tried to load this model yet" in untried and "```python" not in untried
    for layer in report.layers:
        layer.format = "bfloat16"
    plain = model_card(report)
    assert "import compressor" not in plain and "no smaller than the source" in plain


def test_task_results_are_a_table(make_report: Make) -> None:
    report = make_report()
    report.tasks = []
    assert "## Tasks" not in model_card(report)
    report.tasks = [
        TaskResult(task="arc|easy", metric="acc", value=0.625, stderr=0.01, chance=0.25, corrected=0.5, base=0.7,
                   samples=200, total=2376, output_type="multiple_choice", harness="0.4.13"),
    ]  # fmt: skip
    card = model_card(report)
    assert "| arc\\|easy | acc | 0 | 0.6250 ± 0.010 | 0.500 | 0.7000 | 200 of 2,376 |" in card
    assert "lm-eval 0.4.13" in card


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
    assert widths == sorted(widths), "four tables, one after the other"
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 4) + (2 + 2) + (2 + 3) + (2 + 2)


def test_parameters_are_those_that_are_left(make_report: Make) -> None:
    """A narrower model has fewer than its source, and one with a memory more."""
    report = make_report()
    left = sum(row.parameters for row in report.size.ledger)
    assert left != report.model.parameters
    assert f"| parameters | {report.model.parameters:,} | {left:,} |" in model_card(report, None)


def test_markdown_is_one_harmless_line() -> None:
    assert markdown("a_b *c*\n`d` <i>&") == r"a\_b \*c\* \`d\` \<i\>&amp;"
