"""The sample report as a fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from report_sample import full_report

from compressor.report.schema import Report


@pytest.fixture
def make_report() -> Callable[..., Report]:
    return full_report
