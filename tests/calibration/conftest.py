"""Small real tokenizers for the tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest
from calibration_texts import TEMPLATE, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return build_tokenizer(template=TEMPLATE)


@pytest.fixture(scope="session")
def bare_tokenizer() -> Any:
    return build_tokenizer(special=False)
