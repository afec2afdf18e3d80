"""Kernels for these tests: the installed ones, or, where those are missing or stale, compiled here once.

COMPRESSOR_TEST_KERNELS names a file to test instead (the tests of the sanitizers set it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.kernels import native as search
from compressor.kernels.build import compile_kernels
from compressor.kernels.sources import source_digest

SCRATCH = Path(__file__).resolve().parents[2] / "build" / "tests"


@pytest.fixture(scope="session")
def kernels() -> Iterator[search.Native]:
    """The kernels under test. They stay loaded for the tests that need none."""
    named = os.environ.get("COMPRESSOR_TEST_KERNELS")
    with pytest.MonkeyPatch.context() as patch:
        if named:
            patch.setattr(search, "candidates", lambda: [Path(named)])
        search.forget()
        found = search.native()
        if found is None and not named:
            file = SCRATCH / f"{source_digest()}{search.ABI3}"
            try:
                if not file.exists():
                    compile_kernels(file)
            except UserError as error:
                pytest.skip(f"no kernels installed, and none can be compiled: {error}")
            patch.setattr(search, "candidates", lambda: [file])
            search.forget()
            found = search.native()
        assert found is not None, search.search()[1]
        yield found
    search.forget()


@pytest.fixture(autouse=True)
def no_rung_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other folders have one; here they choose their own."""
    monkeypatch.delenv(search.VARIABLE, raising=False)
