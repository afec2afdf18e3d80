"""What tests of several programs that are not ours share."""

from __future__ import annotations

import pytest
from foreign import need_package


@pytest.fixture
def harness() -> None:
    """EleutherAI's lm-eval is there."""
    need_package("lm_eval")
