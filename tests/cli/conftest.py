"""The command line for the tests of this folder."""

from __future__ import annotations

import pytest
from command_line import Command, make_command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``compressor`` with arguments in this process."""
    return make_command(monkeypatch, capsys)
