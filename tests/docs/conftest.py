"""Documentation is tested in folders where the names it uses exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from standing import Standing


@pytest.fixture(scope="session")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Standing:
    """The folders that pages take for granted, each made when it is first asked for."""
    return Standing(tmp_path_factory.mktemp("standing"))


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """A folder of a page's own, which is the current one."""

    def enter() -> Path:
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return enter
