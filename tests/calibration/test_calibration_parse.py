"""The string that --calibration takes, and the YAML files behind the names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.calibration.folders import data_folder
from compressor.calibration.parse import FILE_TYPES, OPTIONS, Request, parse_source, resolve
from compressor.calibration.spec import SourceSpec, named_set, read_set, set_names
from compressor.errors import UserError

_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
_sources = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="="), min_size=1, max_size=20)


@given(
    source=_sources.filter(lambda text: bool(text.strip()) and not Path(text.replace("\0", "")).exists()),
    options=st.dictionaries(st.sampled_from(OPTIONS), _text, max_size=4),
    weight=st.floats(min_value=1e-6, max_value=1e6, allow_subnormal=False),
)
def test_written_and_parsed_again_is_the_same(source: str, options: dict[str, str], weight: float) -> None:
    request = Request(source, options, weight)
    assert parse_source(str(request)) == request


@given(st.text(max_size=40))
def test_any_string_parses_or_is_a_user_error(text: str) -> None:
    try:
        request = parse_source(text)
    except UserError as error:
        assert "\n" not in str(error) or "\n" in text
    else:
        assert request.weight > 0 and set(request.options) <= set(OPTIONS)
        assert text.startswith(request.source)


def test_parts() -> None:
    assert parse_source("c4") == Request("c4")
    assert parse_source("c4@0.7") == Request("c4", {}, 0.7)
    assert parse_source("a.jsonl:field=x,join=space@2") == Request("a.jsonl", {"field": "x", "join": "space"}, 2.0)
    assert parse_source("a.jsonl:field=a%2Cb%40c") == Request("a.jsonl", {"field": "a,b@c"})
    assert parse_source("/data@home/a:b,c=d.jsonl") == Request("/data@home/a:b,c=d.jsonl")


def test_an_existing_file_wins_over_the_syntax(tmp_path: Path) -> None:
    odd = tmp_path / "a:field=b@0.5"
    odd.write_text("x")
    assert parse_source(str(odd)) == Request(str(odd))
    assert parse_source(f"{odd}@3") == Request(str(odd), {}, 3.0)
    assert parse_source(f"{odd}:join=eos@3") == Request(str(odd), {"join": "eos"}, 3.0)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("c4@0", "above 0"),
        ("a.jsonl:feild=x", "'field'"),
        ("a.jsonl:field=x,field=y", "twice"),
    ],
)
def test_bad_syntax(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse_source(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("wikitex2", "did you mean 'wikitext2'"),
        ("missing.jsonl", "no such file"),
        ("missing/c4", "no such file"),
        ("c4:join=eso", "did you mean 'eos'"),
        ("c4:sampling=concat", "did you mean 'concatenate'"),
        ("c4:bos=perhaps", "neither yes nor no"),
    ],
)
def test_bad_sources(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        resolve(parse_source(text))


def test_folder_and_unknown_type(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(UserError, match="is a folder"):
        resolve(parse_source(str(tmp_path / "x.jsonl")))
    with pytest.raises(UserError, match="unknown file type"):
        resolve(parse_source(str(tmp_path / "x.docx")))


def test_options_replace_those_of_the_set() -> None:
    spec = resolve(parse_source("c4:sampling=first,join=space,bos=yes,field=url"))
    assert (spec.sampling, spec.join, spec.bos, spec.field) == ("first", "space", True, "url")
    assert resolve(parse_source("gsm8k:field=question")).template is None


def test_every_packaged_set_is_valid_and_pinned() -> None:
    names = set_names()
    assert {"wikitext2", "wikitext2-test", "c4", "c4-validation", "ultrachat", "gsm8k", "embedded"} <= set(names)
    for name in names:
        spec = named_set(name)
        assert spec.name == name and spec.description and spec.licence
        assert spec.kind == "file" or spec.pinned, f"{name}: revision is not a commit hash"
        assert spec.use == "calibration" or spec.kind == "file" or spec.evaluation is not None
    assert named_set("embedded").path == str(data_folder("calibration") / "embedded.jsonl")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("name: x\nkind: file\npath: a.txt\nrevison: y\n", "did you mean 'revision'"),
        ("name: x\nkind: hub\npath: a/b\n", "needs a revision"),
        ("name: x\nkind: ftp\npath: a/b\n", "kind"),
        ("name: x\nkind: file\n", "path is missing"),
        ("name: x\nkind: file\npath: a\nfield: b\ntemplate: '{c}'\n", "exclude each other"),
        ("- a list\n", "mapping"),
        ("name: [\n", "not YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, part: str) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=part):
        read_set(file)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nkind: file\npath: text.jsonl\njoin: space\n")
    spec = resolve(parse_source(str(tmp_path / "mine.yaml")))
    assert spec == SourceSpec(name="mine", kind="file", path=str(tmp_path / "text.jsonl"), join="space")
    assert ".yaml" in FILE_TYPES
