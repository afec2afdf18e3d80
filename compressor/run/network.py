"""The one way a run loads a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.run.progress import without_bars


def load_whole(folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """Load a model folder through transformers, ready to run."""
    from transformers import AutoModelForCausalLM

    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(device).eval()
