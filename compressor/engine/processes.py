"""Several processes of one run, as ``accelerate launch`` starts them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them; process 0 does what only one can do."""
    return int(os.environ.get("RANK", "0"))


def make_accelerator(device: torch.device) -> Any:
    """Return accelerate's handle on the processes: fp32 on CPUs, products in bf16 elsewhere.

    Processes that only help wait while the first one works alone, which may take days.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    waiting = InitProcessGroupKwargs(timeout=timedelta(days=30))
    on_cpu = device.type == "cpu"
    return Accelerator(cpu=on_cpu, mixed_precision="no" if on_cpu else "bf16", kwargs_handlers=[waiting])
