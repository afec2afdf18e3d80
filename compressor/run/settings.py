"""Settings that every run has, whatever its stages: text, judgement, output. The help and the recipe schema are made
from
them. Imports nothing heavy, since the command line reads it to show its help."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class CalibrationSettings(BaseModel):
    """Which text the statistics are gathered on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...] = Field(
        (), description="named set, file, or 'self'; several are mixed by weight (default: c4; embedded for 'embedded')"
    )
    nsamples: int = Field(128, ge=1, description="number of token windows")
    seqlen: int | None = Field(None, ge=2, description="tokens in a window (default: 2048, or the model's context)")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")


class EvaluationSettings(BaseModel):
    """Which text the result is judged on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[str, ...] = Field(
        (), description="named text or file to evaluate on (default: one that was not calibrated on); 'none' for none"
    )
    windows: int = Field(32, ge=1, description="token windows evaluated of each text")
    seqlen: int | None = Field(None, ge=2, description="tokens in an evaluation window (default: as calibration)")
    baseline: bool = Field(True, description="set plain rounding of the same bytes beside the result")
    samples: int = Field(2, ge=0, le=16, description="texts that source and result go on with, for the report; 0: none")

    @field_validator("texts")
    @classmethod
    def _none_stands_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "none" in value and len(value) > 1:
            raise ValueError("'none' and a text exclude each other")
        return value


class OutputSettings(BaseModel):
    """How it is computed and stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    save: Literal["packed", "dense"] = Field("packed", description="packed: small; dense: plain zeros, for any runtime")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute precision (auto: float32 on CPUs, the checkpoint's own elsewhere)"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ... (auto: an accelerator when there is one)")
    verify: bool = Field(True, description="let a fresh process reload the result and reproduce its logits")
