"""Packed layers through the kernels of the package. Not part of the reader file, which has none."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from compressor.hf.manifest import MODEL_TYPE
from compressor.hf.quantizer import CompressorQuantizer
from compressor.kernels.model import accelerate


class FastQuantizer(CompressorQuantizer):
    """Lays packed layers out for the kernels once they are filled."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        accelerate(model)
        return model


def register() -> None:
    """Let transformers read packed folders with this quantizer."""
    AUTO_QUANTIZER_MAPPING[MODEL_TYPE] = FastQuantizer
