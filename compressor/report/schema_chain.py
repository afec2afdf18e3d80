"""The parts of ``report.json`` about what came before: the stages of a recipe, and earlier runs on the same model."""

from __future__ import annotations

from pydantic import Field

from compressor.report.part import Part
from compressor.report.schema_evaluation import Evaluation


class StageResult(Part):
    """What one stage of a recipe left behind. Quality is measured once, after the last one."""

    label: str = Field(description="the stage in a few words")
    matrices: int = Field(description="decoder linears it changed")
    bytes: int = Field(description="bytes of all decoder linears after it, packed")
    bits_per_weight: float = Field(description="8 * bytes / their parameters")
    sparsity: float = Field(description="fraction of exact zeros in all decoder linears after it, 0..1")
    relative_error: float | None = Field(
        default=None,
        description="median over the linears it changed, against the weights of this run's source, on the inputs "
        "that the stage had; null without data",
    )


class EarlierRun(Part):
    """A run whose output was the source of the next one, as that folder's report.json says."""

    source: str = Field(description="the model it began with")
    label: str = Field(description="what it did, in a few words")
    stages: list[StageResult] = Field(default_factory=list, description="of its recipe, where it had several")
    version: str = Field(description="version of compressor")
    command: str = Field(description="the command line as typed")
    started: str = Field(description="ISO 8601 in UTC")
    seconds: float = Field(description="wall-clock time, seconds")
    source_bytes: int = Field(description="bytes of its source's weight files")
    output_bytes: int = Field(
        description="bytes of its output's weight files, or of those of the export that was gone on with"
    )
    bits_per_weight_linears: float | None = Field(
        description="bits of the decoder linears / their source parameters; null where an export did not say"
    )
    bits_per_weight_model: float | None = Field(
        description="bits of all tensors / distinct source parameters; null where an export did not say"
    )
    source_bits_per_weight: float = Field(description="the same of its source")
    sparsity: float = Field(description="fraction of exact zeros in the decoder linears, 0..1")
    evaluation: list[Evaluation] = Field(
        default_factory=list, description="its evaluation, without the baseline; 'dense' there is its own source"
    )
    baseline: str = Field(default="", description="its verdict on plain rounding at the same bytes")
