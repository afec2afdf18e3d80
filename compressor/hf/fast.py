"""Loaded models through the kernels of the package. Not part of the reader file, which has none."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from compressor.hf.decoding import quicken
from compressor.hf.manifest import MODEL_TYPE
from compressor.hf.quantizer import CompressorQuantizer
from compressor.kernels.model import Accelerated, lay_out
from compressor.kernels.native import rung_and_why


def accelerate(model: nn.Module, way: str | None = None) -> Accelerated:
    """Make a loaded model with packed layers fast where it is, once: the layers, and on CPUs what is around them.

    Args:
        model: whose layers may be packed; without any it stays as it is.
        way: rung to use; by default what `compressor.kernels.native.rung` says.

    Raises:
        UserError: an environment variable asks for what there is not.
    """
    found = lay_out(model, way)
    if found.layers:
        quicken(model, way or rung_and_why()[0])
    return found


class FastQuantizer(CompressorQuantizer):
    """Lays packed layers out for the kernels once they are filled."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        accelerate(model)
        return model


def register() -> None:
    """Let transformers read packed folders with this quantizer."""
    AUTO_QUANTIZER_MAPPING[MODEL_TYPE] = FastQuantizer
