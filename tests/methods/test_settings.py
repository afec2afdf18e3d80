from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compressor.methods.settings import AdmmSettings, PruneSettings, SparseGPTSettings, parse_pattern
from compressor.methods.table import METHODS


def test_sparsity_is_one_half_by_default() -> None:
    assert PruneSettings().sparsity == 0.5
    assert PruneSettings(pattern="2:4").sparsity is None
    assert PruneSettings(sparsity=0.7).pattern is None
    assert PruneSettings(pattern=" 4 : 8 ").pattern == "4:8"
    assert PruneSettings(pattern="4:8").group == (4, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 0.5, "pattern": "2:4"}, "exclude each other"),
        ({"sparsity": 0.0}, "greater than 0"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"pattern": "4:4"}, "1 <= N < M"),
        ({"pattern": "0:4"}, "1 <= N < M"),
        ({"pattern": "2of4"}, "must be N:M"),
        ({"allocation": "owl", "pattern": "2:4"}, "use --sparsity"),
        ({"allocation": "best"}, "'uniform' or 'owl'"),
        ({"include": ("(",)}, "not a regular expression"),
        ({"damp": 0}, "greater than 0"),
        ({"block": 0}, "greater than or equal to 1"),
        ({"sparsty": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneSettings(**given)


def test_bits_and_refit_exclude_each_other() -> None:
    assert SparseGPTSettings(bits=4).refit is False
    with pytest.raises(ValidationError, match="give one of bits and refit"):
        SparseGPTSettings(bits=4, refit=True)
    with pytest.raises(ValidationError):
        SparseGPTSettings(bits=9)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        AdmmSettings().rho = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_field_is_described(name: str) -> None:
    for field, info in METHODS[name].settings.model_fields.items():
        assert info.description, field


def test_parse_pattern() -> None:
    assert parse_pattern("2:4") == (2, 4)
    with pytest.raises(ValueError, match="N:M"):
        parse_pattern("2:4:8")
