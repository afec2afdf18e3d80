"""The base of every object in a report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Unknown keys are errors; infinities survive the trip through JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")
