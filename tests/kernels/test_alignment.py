"""Plain matrices at any address."""

from __future__ import annotations

import pytest
import torch

from compressor.formats import pack
from compressor.formats.dense import Dense
from compressor.formats.low_rank import LowRank
from compressor.kernels.matrix import ALIGNMENT, aligned
from compressor.kernels.native import Native
from compressor.kernels.products import make_product


@pytest.mark.parametrize("shift", [0, 1, 4, 31, 32])
def test_factors_at_any_address(kernels: Native, shift: int) -> None:
    room, generator = torch.randn(2000, generator=torch.Generator().manual_seed(shift)).half(), torch.Generator()
    left = room[shift : shift + 40 * 6].view(40, 6)
    right = room[1000 + shift : 1000 + shift + 6 * 96].view(6, 96)
    spec, packed = pack(LowRank(Dense(left), Dense(right)), torch.float16)
    parts = {name: next(each for each in (left, right) if each.shape == part.shape) for name, part in packed.items()}
    x = torch.randn(2, 96, generator=generator.manual_seed(1)).half()
    found = make_product(parts, spec, "portable").product(x, None, "portable", False)
    want = x.double() @ (left.double() @ right.double()).T
    assert (found - want).abs().max() <= 0.02 * want.abs().max()
    assert aligned(left).data_ptr() % ALIGNMENT == 0 and torch.equal(aligned(left), left)
    assert aligned(room).data_ptr() == room.data_ptr()  # not copied where it need not be
