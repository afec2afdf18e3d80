"""A ratio that fails when the kernels are not what they are for; never a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from kernel_cases import CASES
from torch.nn import functional as F  # noqa: N812

from compressor.kernels.native import LEVELS, Native


def cpu_seconds(work: Callable[[], object], times: int = 10) -> float:
    start = time.thread_time()
    for _ in range(times):
        work()
    return (time.thread_time() - start) / times


def test_two_planes_of_trits_beat_bf16(kernels: Native) -> None:
    """CPU time of one thread, in turns, 2048 x 2048, one token: at least three times as fast.

    PyTorch 2.15 multiplies a row of bf16 2.5 times as fast as 2.13.
    """
    if not kernels.best:
        pytest.skip("plain C++ only on this processor")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = CASES["trit2"](2048, 2048, 128, LEVELS[kernels.best]).matrix
        weight, x = torch.randn(2048, 2048).bfloat16(), torch.randn(1, 2048).bfloat16()
        pairs = []
        for _ in range(15):
            ours = cpu_seconds(lambda: matrix.product(x, None, LEVELS[kernels.best], False))
            pairs.append(cpu_seconds(lambda: F.linear(x, weight)) / ours)
    finally:
        torch.set_num_threads(threads)
    assert median(pairs) >= (3 if torch.__version__ < (2, 14) else 1.7), sorted(pairs)
