"""Settings that every run has, whatever its stages: text, judgement, output. The help and the recipe schema are made
from
them. Imports nothing heavy, since the command line reads it to show its help."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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

    tasks: tuple[str, ...] = Field(
        (),
        description="questions that source and result answer at the end, by lm-eval: a file (.jsonl), a task file or "
        "folder of lm-eval (.yaml), or the name of one of its tasks",
    )
    task_limit: int | None = Field(None, ge=1, description="questions of each task, the first ones (default: all)")
    task_shots: int | None = Field(
        None, ge=0, description="examples before each question of a task (default: as the task has it)"
    )

    @field_validator("texts")
    @classmethod
    def _none_stands_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "none" in value and len(value) > 1:
            raise ValueError("'none' and a text exclude each other")
        return value

    @model_validator(mode="after")
    def _about_tasks(self) -> EvaluationSettings:
        if not self.tasks and (self.task_limit is not None or self.task_shots is not None):
            raise ValueError("'task_limit' and 'task_shots' are about 'tasks', and none was named")
        return self


class OutputSettings(BaseModel):
    """How it is computed and stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    save: Literal["packed", "dense"] = Field("packed", description="packed: small; dense: plain zeros, for any runtime")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute precision (auto: float32 on CPUs, the checkpoint's own elsewhere)"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ... (auto: an accelerator when there is one)")
    verify: bool = Field(True, description="let a fresh process reload the result and reproduce its logits")
