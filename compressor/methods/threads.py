"""The same bits on any number of CPU threads.

MKL's matrix product divides its result among the threads, and treats the ragged edge of a share differently from its
inside: a narrow result (6 x 3000 on two threads, 100 x 100 on four) has other bits than on one thread. From about 32
rows and columns a thread on, none were seen to differ. Narrow products are cheap, so they are made on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

SHARE = 32


@contextmanager
def one_thread() -> Iterator[None]:
    """Do what is inside on one CPU thread, for the few things whose bits would depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steady(*dims: int) -> AbstractContextManager[None]:
    """Make fp32 matrix products inside that have a result of ``dims`` (rows, columns) independent of the threads."""
    threads = torch.get_num_threads()
    return one_thread() if threads > 1 and min(dims) < SHARE * threads else nullcontext()


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """Return A B (m, n) in fp32, the same bits on any number of threads."""
    with steady(A.shape[0], B.shape[1]):
        return A @ B


def submul_(C: Tensor, A: Tensor, B: Tensor) -> None:
    """Subtract A B from C (m, n) in place, fp32, the same bits on any number of threads."""
    with steady(*C.shape):
        C.addmm_(A, B, alpha=-1)
