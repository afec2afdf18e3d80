"""Kernels for these tests: those of an emulated ARM processor, in the place of the installed ones."""

from __future__ import annotations

from collections.abc import Iterator

import arm
import pytest

from compressor.kernels import native as search
from compressor.kernels.native import Native


def processor(cpu: str) -> Iterator[Native]:
    """The kernels of a processor."""
    arm.need_emulator()
    module = arm.Module(cpu)
    file = arm.kernels_for_arm()
    yield Native(module, file, module.levels, module.bf16)
    module.close()


@pytest.fixture(scope="session")
def with_dot_products() -> Iterator[Native]:
    yield from processor(arm.WITH_DOT_PRODUCTS)


@pytest.fixture(scope="session")
def without() -> Iterator[Native]:
    yield from processor(arm.WITHOUT)


@pytest.fixture
def use() -> Iterator[object]:
    """Let what is found be these kernels, until the test ends."""
    with pytest.MonkeyPatch.context() as patch:

        def found(kernels: Native) -> Native:
            patch.setattr(search, "candidates", lambda: [kernels.file])
            patch.setattr(search, "load", lambda _: kernels)
            search.forget()
            return kernels

        yield found
    search.forget()


@pytest.fixture
def kernels(use: object, with_dot_products: Native) -> Native:
    return use(with_dot_products)  # type: ignore[operator, no-any-return]
