"""Names under which methods are known elsewhere lead to what there is here."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.errors import UserError
from compressor.methods.published import PUBLISHED, Known, plain_name
from compressor.run.recipe import STAGES, make_stage


def stage_of(known: Known) -> Any:
    """The stage that the flags of a hint stand for, as the command line reads them."""
    method, *words = known.flags.split()
    content: dict[str, Any] = {"method": method}
    while words:
        flag = words.pop(0)
        assert flag.startswith("--"), known
        content[flag[2:].replace("-", "_")] = words.pop(0) if words and not words[0].startswith("--") else True
    numbers = {key: int(value) for key, value in content.items() if isinstance(value, str) and value.isdigit()}
    return make_stage(known.kind, {**content, **numbers})


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_hint_says_works(name: str) -> None:
    assert stage_of(PUBLISHED[name]).kind == PUBLISHED[name].kind
    assert not any(plain_name(name) == plain_name(own) for methods in STAGES.values() for own in methods), "no news"


def test_no_name_stands_there_twice() -> None:
    assert len(set(map(plain_name, PUBLISHED))) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("quantize", "ptqtp", "(here it is compressor quantize MODEL --method trit-planes --fit paper)"),
        (
            "quantize",
            "PT2-LLM",
            "(not here; nearest to it is compressor quantize MODEL --method trit-planes --planes 1)",
        ),
        ("quantize", "optq", "(here it is compressor quantize MODEL --method gptq)"),
        ("quantize", "bitnet_b1.58", "(not here; nearest to it is"),
        ("quantize", "PBLLM", "(did you mean 'pb-llm'?)"),
        ("prune", "Alps", "(here it is compressor prune MODEL --method admm)"),
        ("prune", "gptq", "(a method of quantize: compressor quantize MODEL --method gptq)"),
        ("prune", "sparsgpt", "(did you mean 'sparsegpt'?)"),
        ("decompose", "SVDLLM", "(did you mean 'svd-llm'?)"),
        ("linearize", "gated-deltanet", "(here it is compressor linearize MODEL --method gdn)"),
        ("prune", "--", "(known: admm, magnitude, sparsegpt, wanda)"),
    ],
)
def test_hints(kind: str, name: str, hint: str) -> None:
    with pytest.raises(UserError) as refusal:
        make_stage(kind, {"method": name})
    assert hint in str(refusal.value)
