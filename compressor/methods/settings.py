"""The settings of the pruning methods: one frozen class each; its descriptions are the help and the recipe's schema."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST_GROUP = 32


def parse_pattern(text: str) -> tuple[int, int]:
    """Return (N, M) of ``"N:M"``: N weights kept out of every M consecutive inputs, 1 <= N < M <= 32.

    Raises:
        ValueError: ``text`` is no such pattern; the message says what was expected.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"pattern {text!r} must be N:M, N weights kept of every M, for example 2:4")
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept < group <= LARGEST_GROUP:
        raise ValueError(f"pattern {text!r} must have 1 <= N < M <= {LARGEST_GROUP}, N weights kept of every M")
    return kept, group


def valid_regexes(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``value`` if all are regular expressions; ValueError names the first that is not."""
    for text in value:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return value


class PruneSettings(BaseModel):
    """What every pruning method takes. Exactly one of `sparsity` and `pattern`; sparsity 0.5 when neither is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    sparsity: float | None = Field(
        None, gt=0, lt=1, allow_inf_nan=False, description="fraction of each weight matrix set to zero (0.5 by default)"
    )
    pattern: str | None = Field(
        None, description="N:M, for example 2:4: N weights kept out of every M consecutive inputs; instead of sparsity"
    )
    allocation: Literal["uniform", "owl"] = Field(
        "uniform", description="uniform: every matrix gets the same sparsity; owl: blocks with more outliers get less"
    )
    owl_threshold: float = Field(
        5.0, gt=0, description="owl: an outlier is a |weight| x input norm above this multiple of the layer's mean"
    )
    owl_band: float = Field(
        0.08, ge=0, lt=0.5, description="owl: a block's sparsity stays within about this distance of the target"
    )
    include: tuple[str, ...] = Field((), description="prune only modules whose name matches one of these regexes")
    exclude: tuple[str, ...] = Field((), description="leave out modules whose name matches one of these regexes")
    damp: float = Field(
        0.01, gt=0, lt=1, description="damping of the Hessian, relative to the mean of its diagonal; raised when needed"
    )
    block: int = Field(128, ge=1, description="columns whose mask is chosen together, and lazily updated together")
    refit: bool = Field(
        False, description="afterwards refit the kept weights by least squares on the calibration inputs (masked PCG)"
    )

    refit_iterations: int = Field(
        5, ge=1, description="refit: steps of conjugate gradients; few generalise better than many"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_sparsity(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sparsity") is None and data.get("pattern") is None:
            return {**data, "sparsity": 0.5}
        return data

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        return None if value is None else "{}:{}".format(*parse_pattern(value))

    @field_validator("include", "exclude")
    @classmethod
    def _check_regexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return valid_regexes(value)

    @model_validator(mode="after")
    def _check_together(self) -> PruneSettings:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(f"sparsity ({self.sparsity:g}) and pattern ({self.pattern}) exclude each other: give one")
        if self.allocation == "owl" and self.pattern is not None:
            raise ValueError(f"allocation owl varies the sparsity, and pattern {self.pattern} fixes it: use --sparsity")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def share(self) -> float:
        """Fraction of zeros asked for, by sparsity or pattern."""
        return self.sparsity or 0.0 if self.group is None else 1 - self.group[0] / self.group[1]

    @property
    def needs_data(self) -> bool:
        """Whether calibration inputs are needed: here only to refit, or to allocate."""
        return self.refit or self.allocation == "owl"

    def label(self, method: str) -> str:
        """What was asked for, in a few words."""
        return f"{method}{'+refit' if self.refit else ''} {self.pattern or f'{self.sparsity:.0%}'}"


class MagnitudeSettings(PruneSettings):
    """Magnitude: the smallest |weight| of a matrix go. No data needed, unless refitted."""


class WandaSettings(PruneSettings):
    """Wanda: in every row, the smallest |weight| x input norm go."""

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True


class SparseGPTSettings(PruneSettings):
    """SparseGPT: column by column, the rest of the row makes up for what was pruned."""

    bits: int | None = Field(
        None, ge=2, le=8, description="round the kept weights to this many bits (one grid per row) in the same sweep"
    )

    refit: bool = Field(
        True, description="afterwards refit the kept weights by least squares; --no-refit is SparseGPT as published"
    )

    @model_validator(mode="before")
    @classmethod
    def _bits_stay_on_their_grid(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("bits") is not None and "refit" not in data:
            return {**data, "refit": False}
        return data

    @model_validator(mode="after")
    def _check_bits(self) -> SparseGPTSettings:
        if self.bits is not None and self.refit:
            raise ValueError(f"refit would move the weights off the {self.bits}-bit grid: give one of bits and refit")
        return self

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def label(self, method: str) -> str:
        """What was asked for, in a few words."""
        return super().label(method) + (f" {self.bits}-bit" if self.bits else "")


class AdmmSettings(PruneSettings):
    """ALPS: mask and weights together by ADMM, then PCG on the mask that was found."""

    iterations: int = Field(300, ge=1, description="ADMM: at most this many iterations")
    rho: float = Field(0.1, gt=0, description="ADMM: penalty at the start (inputs scaled to unit variance); it grows")
    refit: bool = Field(True, description="afterwards refit the kept weights by least squares (part of the method)")

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def label(self, method: str) -> str:
        """What was asked for, in a few words; refitting is part of the method."""
        return super().label(method).replace("+refit", "")


PRUNE_METHODS: dict[str, type[PruneSettings]] = {
    "magnitude": MagnitudeSettings,
    "wanda": WandaSettings,
    "sparsegpt": SparseGPTSettings,
    "admm": AdmmSettings,
}
"""The settings class of every pruning method. The methods themselves stand in ``METHODS``."""
