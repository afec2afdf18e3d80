"""Several processes of one run, as ``accelerate launch``, ``torchrun`` or ``mpirun`` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from compressor.engine.sharding import sharding_asked, unseen
from compressor.errors import UserError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables in which launchers (torchrun, MPICH and Intel MPI, Open MPI, MVAPICH) say it; those that
accelerate reads, in its order."""


def world_size() -> int:
    """Number of processes of this run."""
    return _told(SIZES, 1)


def rank() -> int:
    """Number of this process among them; process 0 does what only one can do."""
    return _told(RANKS, 0)


def _told(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def make_accelerator(device: torch.device) -> Any:
    """Return accelerate's handle on the processes: fp32 on CPUs, products in bf16 elsewhere.

    Processes that only help wait while the first one works alone, which may take days.

    Raises:
        UserError: accelerate does not see the processes that the launcher has started, or models are to be sharded in a
            way that we cannot.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    sharding_asked()  # what stands against it is told before the work
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=30))
    on_cpu = device.type == "cpu"
    with unseen():
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no" if on_cpu else "bf16", kwargs_handlers=[waiting])
    if accelerator.num_processes != world_size():
        raise UserError(
            f"{world_size()} processes were started, but accelerate sees {accelerator.num_processes} on this device",
            fix="start them with torchrun, or with accelerate launch --multi_gpu",
        )
    return accelerator


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Something that every process does its part of. It ends when all have ended, and an error of one is an error of
    all: nobody waits for a process that has failed.

    Raises:
        UserError: another process has failed; says with what.
    """
    from accelerate.utils import gather_object

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = gather_object([None if failure is None else (str(failure) or type(failure).__name__)])
    if failure is not None:
        raise failure
    for number, message in enumerate(told):
        if message is not None:
            raise UserError(f"{message} (process {number})")
