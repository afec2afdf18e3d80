"""Recipes: what is refused, with which words, and that nothing makes validation crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.errors import UserError
from compressor.methods.settings import PRUNE_METHODS
from compressor.run.recipe import load_recipe, make_recipe, make_stage

HALF = {"prune": {"method": "sparsegpt", "sparsity": 0.5}}
READY = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


def chain(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"stages": [{"prune": stage} for stage in stages]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"stages": [HALF], "calibratoin": {}}, ["calibratoin", "'calibration'"]),
        ({"stages": [HALF], "calibration": {"nsample": 3}}, ["nsample", "'nsamples'"]),
        ({"stages": [HALF], "evaluation": {"window": 3}}, ["window", "'windows'"]),
        (chain({"method": "sparsegpt", "sparsty": 0.5}), ["sparsty", "'sparsity'"]),
        (chain({"method": "sparsgpt"}), ["sparsgpt", "'sparsegpt'"]),
        (chain({"method": "wanda", "bits": 4}), ["bits"]),
        (chain({"sparsity": 0.5}), ["needs a method", "wanda"]),
        ({"stages": [{"prun": {}}]}, ["prun", "'prune'"]),
        ({"stages": []}, ["stages"]),
        ({}, ["stages"]),
        ({"stages": {"prune": {}}}, ["stages"]),
        ({"stages": ["prune"]}, ["stage 1"]),
        ({"stages": [{**HALF, "x": {}}]}, ["stage 1"]),
        ({"stages": [HALF], "dtype": "int8"}, ["dtype", "int8"]),
        ({"stages": [HALF], "calibration": {"nsamples": 0}}, ["calibration.nsamples"]),
        (chain({"method": "wanda", "sparsity": 0}), ["sparsity"]),
        (chain({"method": "wanda", "sparsity": 1}), ["sparsity"]),
        (chain({"method": "wanda", "sparsity": 1.5}), ["sparsity", "1.5"]),
        (chain({"method": "wanda", "sparsity": float("nan")}), ["sparsity"]),
        (chain({"method": "wanda", "pattern": "4:2"}), ["4:2", "N < M"]),
        (chain({"method": "wanda", "pattern": "2-4"}), ["2-4", "N:M"]),
        (chain({"method": "wanda", "pattern": "2:4", "sparsity": 0.5}), ["exclude each other"]),
        (chain({"method": "wanda", "include": ["("]}), ["("]),
        (chain({"method": "wanda", "sparsity": 0.6}, {"method": "wanda", "sparsity": 0.5}), ["stage 2", "rise"]),
        (chain({"method": "wanda", "pattern": "2:4"}, {"method": "wanda", "sparsity": 0.4}), ["stage 2", "rise"]),
        (chain({"method": "wanda", "pattern": "2:4"}, {"method": "wanda", "pattern": "4:8"}), ["stage 2", "rise"]),
        (chain({"method": "sparsegpt", "bits": 4}, {"method": "wanda", "sparsity": 0.6}), ["stage 2", "final"]),
        (
            chain({"method": "wanda"}, {"method": "wanda", "sparsity": 0.6, "allocation": "owl"}),
            ["stage 2", "owl", "first"],
        ),
    ],
)
def test_mistakes_are_named(content: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_recipe(content)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_possible_chains_are_allowed() -> None:
    for stages in (
        ({"method": "wanda", "sparsity": 0.4}, {"method": "sparsegpt", "sparsity": 0.6}),
        ({"method": "wanda", "sparsity": 0.6}, {"method": "sparsegpt", "pattern": "2:4"}),
        ({"method": "wanda", "pattern": "2:4"}, {"method": "sparsegpt", "sparsity": 0.6, "bits": 4}),
        ({"method": "wanda", "pattern": "2:4"}, {"method": "sparsegpt", "pattern": "1:4"}),
    ):
        assert len(make_recipe(chain(*stages)).stages) == 2


@pytest.mark.parametrize("method", PRUNE_METHODS)
def test_a_resolved_recipe_is_the_same_recipe(method: str) -> None:
    for stage in ({"sparsity": 0.3}, {"pattern": "2:4"}, {"include": ["mlp"], "exclude": ["up"]}):
        recipe = make_recipe(chain({"method": method, **stage}))
        text = yaml.safe_dump(recipe.resolved())
        assert make_recipe(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize("path", READY, ids=[path.stem for path in READY])
def test_ready_recipes_are_valid_by_name_and_by_path(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(str(path))
    assert load_recipe(path.stem).name == path.stem


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "mapping"),
        ("- a", "mapping"),
        ("a: [", "YAML"),
        ("a: 2001-99-99", "YAML"),
        ("[" * 5000, "YAML"),
        ("{[1]: 2}", "YAML"),
        ("stages: [{prune: {1: 2}}]", "method"),
        ("stages: [{prune: {method: wanda, 1: 2}}]", "1"),
        ("stages: [{prune: {method: [wanda]}}]", "wanda"),
        ("1: 2\nstages: [{prune: {method: wanda}}]", "1"),
        ("stages: [{prune: {method: wanda}}]\ncalibration:", "calibration"),
    ],
)
def test_files_that_are_no_recipe(content: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=word):
        load_recipe(str(file))


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'sparsegpt-50'"):
        load_recipe("sparsgpt-50")
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match="recipe"):
            load_recipe(str(path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml"):
        load_recipe(str(tmp_path / "binary.yaml"))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
KEYS = st.sampled_from(
    ["stages", "prune", "method", "sparsity", "pattern", "calibration", "nsamples", "sources", "evaluation", "dtype"]
)
ANYTHING = st.recursive(
    LEAVES | st.sampled_from(["wanda", "sparsegpt", "2:4", "owl", "cpu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4) | st.integers(), inner),
    max_leaves=12,
)
STAGE = st.dictionaries(st.sampled_from([*PRUNE_METHODS["admm"].model_fields, "bits", "x"]), ANYTHING, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS | st.text(max_size=4) | st.integers(), ANYTHING, max_size=4), st.lists(STAGE, max_size=2))
def test_nothing_but_a_user_error_ever_comes_out(content: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    for stage in stages:
        stage.setdefault("method", "admm")
    listed = {"stages": [{"prune": stage} for stage in stages]} if stages else {}
    try:
        recipe = make_recipe({**content, **listed})
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert make_recipe(recipe.resolved()) == recipe


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.binary(max_size=40))
def test_no_file_content_makes_it_crash(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        load_recipe(str(file))


def test_a_percentage_is_told_how_to_be_a_share() -> None:
    with pytest.raises(UserError, match=r"sparsity: Input should be less than 1 \(got 50\.0; 50 % is 0\.5\)"):
        make_stage("prune", {"method": "magnitude", "sparsity": 50.0})
    with pytest.raises(UserError, match=r"less than 1 \(got 1\.0\)$"):
        make_stage("prune", {"method": "magnitude", "sparsity": 1.0})
    with pytest.raises(UserError, match=r"magnitude: pattern '2-4' must be N:M, .* example 2:4$"):
        make_stage("prune", {"method": "magnitude", "pattern": "2-4"})
