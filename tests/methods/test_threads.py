from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.methods.threads import matmul, one_thread, submul_


@pytest.mark.parametrize(
    "shape", [(1, 50), (5, 300), (6, 3001), (11, 11), (100, 100), (200, 1000), (3001, 22), (128, 513)]
)
@pytest.mark.parametrize("inner", [16, 128])
def test_products_do_not_depend_on_threads(
    shape: tuple[int, int], inner: int, on_threads: Callable[..., list[Tensor]]
) -> None:
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(shape[0], inner, generator=g), torch.randn(inner, shape[1], generator=g)
    C = torch.randn(shape, generator=g)

    def subtracted() -> Tensor:
        out = C.clone()
        submul_(out, A, B)
        return out

    one, *others = on_threads(matmul, A, B)
    assert all(torch.equal(one, other) for other in others)
    one, *others = on_threads(subtracted)
    assert all(torch.equal(one, other) for other in others)
    assert torch.allclose(one, C - A @ B, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
