"""The settings of the quantizing methods: one frozen class each; the descriptions are help and recipe schema."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compressor.methods.settings import valid_regexes

SHOWN_WIDTHS = 3
"""Widths of groups that a label lists; of more it says from where to where."""


class QuantizeSettings(BaseModel):
    """What every quantizing method takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    group: int | Literal["row"] = Field(
        128,
        description="consecutive inputs that share their scales, or 'row'; where it does not divide a matrix, integers "
        "take the nearest number that does (the report says which); of other codes the last group of a row is shorter",
    )
    damp: float = Field(
        0.01, gt=0, lt=1, description="damping of the Hessian, relative to the mean of its diagonal; raised when needed"
    )
    block: int = Field(128, ge=1, description="columns that are lazily updated together")
    include: tuple[str, ...] = Field((), description="quantize only modules whose name matches one of these regexes")
    exclude: tuple[str, ...] = Field((), description="leave out modules whose name matches one of these regexes")

    tune_steps: int = Field(
        0,
        ge=0,
        description="afterwards learn the codes of each block together, by so many steps against the block's output "
        "before (learned rounding)",
    )
    tune_rate: float = Field(5e-3, gt=0, lt=1, description="tune: learning rate, relative to the size of a weight")
    tune_mode: Literal["block", "end-to-end"] = Field(
        "block",
        description="tune: block by block, each against its output before; or end-to-end, all blocks together against "
        "the dense model's predictions (distillation), which keeps the parameters of all of them in memory",
    )

    correct: int = Field(
        0, ge=0, description="add a matrix of this rank that makes up for the error of the code; 0 adds none"
    )
    correct_bits: Literal[16, 8, 4] = Field(16, description="correct: bits of the two factors; 16 is fp16")

    embeddings: Literal[8, 4] | None = Field(
        None, description="also store the input embedding and the output head, as integers of so many bits"
    )

    @field_validator("group", mode="before")
    @classmethod
    def _check_group(cls, value: Any) -> Any:
        text = str(value)
        if text != "row" and (not text.isdigit() or int(text) < 1):
            raise ValueError(f"group {text!r} must be a number of inputs, such as 128, or row")
        return text if text == "row" else int(text)

    @field_validator("include", "exclude")
    @classmethod
    def _check_regexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return valid_regexes(value)

    @model_validator(mode="after")
    def _something_to_learn(self) -> QuantizeSettings:
        if self.tune_mode == "end-to-end" and not self.tune_steps:
            raise ValueError("tune_mode end-to-end needs tune_steps, such as 400")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether calibration inputs are needed."""
        return True

    def label(self, method: str, stored: Collection[int] = ()) -> str:
        """What was asked for, in a few words.

        Args:
            stored: inputs that share their scales, as stored, of all matrices; told in place of what was asked for.
        """
        return f"{method} {self.grouping(stored)}{self.extras}"

    def grouping(self, stored: Collection[int] = ()) -> str:
        """``g128``, ``g86/128``, ``g6 to 128`` or ``by row``."""
        if self.group == "row":
            return "by row"
        widths = sorted(set(stored)) or [self.group]
        return f"g{widths[0]} to {widths[-1]}" if len(widths) > SHOWN_WIDTHS else f"g{'/'.join(map(str, widths))}"

    @property
    def extras(self) -> str:
        """What was asked for on top of the method."""
        learned = " learned" if self.tune_steps else ""
        learned += " end to end" if self.tune_mode == "end-to-end" else ""
        factors = "" if self.correct_bits == 16 else f" {self.correct_bits}-bit"
        correction = f" + rank {self.correct}{factors}" if self.correct else ""
        embeddings = f" + {self.embeddings}-bit embeddings" if self.embeddings else ""
        return learned + correction + embeddings

    def width(self, n: int) -> int:
        """Return how many of a row's ``n`` inputs a group has."""
        return n if self.group == "row" else min(int(self.group), n)


class TritPlanesSettings(QuantizeSettings):
    """Trit planes (PTQTP): every weight a sum of one to three values -a, 0 or +a, the a's shared by a group."""

    planes: Literal[1, 2, 3, "auto"] = Field(
        2, description="number of trit planes; 'auto' finds one for each matrix, within bpw bits a weight"
    )
    bpw: float | None = Field(
        None, gt=0, description="planes auto: bits a weight over all matrices of the stage, scales included"
    )
    fit: Literal["default", "paper", "data-free"] = Field(
        "default",
        description="default: many starts, error feedback, scales refitted on the inputs; paper: as published (PTQTP); "
        "data-free: many starts on the weights alone",
    )
    rounds: int = Field(3, ge=0, description="rounds of descent over all groups, after the sweep (default fit)")

    @property
    def count(self) -> int:
        """The number of planes, once it is known."""
        if self.planes == "auto":
            raise ValueError("the number of planes is still to be found")
        return self.planes

    @field_validator("planes", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @model_validator(mode="after")
    def _budget(self) -> TritPlanesSettings:
        if self.planes == "auto" and self.bpw is None:
            raise ValueError("planes auto needs a budget: bpw, bits a weight such as 2.5")
        if self.planes != "auto" and self.bpw is not None:
            raise ValueError("bpw is the budget of planes auto, and planes is a number")
        return self

    @property
    def needs_data(self) -> bool:
        """For the fit to the inputs, and to find out which matrices need more planes."""
        return self.fit == "default" or self.planes == "auto"

    def label(self, method: str, stored: Collection[int] = ()) -> str:
        """As for every method."""
        if self.planes == "auto":
            return f"{method} {self.bpw:g} bpw {self.grouping(stored)}{self.extras}"
        fit = "" if self.fit == "default" else f" {self.fit}"
        return f"{method} K={self.planes} {self.grouping(stored)}{fit}{self.extras}"


class Ptq161Settings(QuantizeSettings):
    """PTQ1.61: a fifth of the inputs in 4 bits, of all other weights a sign, scaled by row and by input."""

    group: Literal["row"] = Field("row", description="scales are those of rows and of inputs")
    salient: float = Field(0.2, ge=0, lt=1, description="share of the inputs that stay integers")
    salient_bits: Literal[4, 8] | None = Field(4, description="bits of a weight of a salient input")
    fit: Literal["default", "paper"] = Field(
        "default", description="default: fitted to the inputs by turns; paper: as published, before it learns"
    )
    rounds: int = Field(3, ge=0, description="rounds in which scales, signs and salient inputs are fitted by turns")
    preprocess: int = Field(
        0, ge=0, description="before: let the weights of each block learn, by so many steps, to bear binarization"
    )

    @property
    def bits(self) -> int:
        """Bits of a salient weight."""
        return self.salient_bits or 4

    def label(self, method: str, stored: Collection[int] = ()) -> str:
        """As for every method."""
        fit = "" if self.fit == "default" else f" {self.fit}"
        return f"{method} {100 * self.salient:g}% {self.bits}-bit{fit}{self.extras}"


class PbLlmSettings(QuantizeSettings):
    """Partial binarization (PB-LLM): a few salient weights as integers, of all others only a sign."""

    salient: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the weights, or inputs, that stay integers (default: 0.1, with --mask column 0.24)",
    )
    salient_bits: Literal[4, 8] | None = Field(
        None, description="bits of a salient weight (default: 8, with --mask column 4)"
    )
    metric: Literal["magnitude", "hessian"] = Field(
        "hessian", description="what makes a weight salient: its size, or what a sign would cost at the output"
    )
    mask: Literal["unstructured", "column"] = Field(
        "unstructured", description="what is salient: any weights, or whole inputs, whose places take no room"
    )
    fit: Literal["default", "paper"] = Field(
        "default", description="default: fitted to the inputs by turns; paper: as published, defects included"
    )
    means: bool = Field(False, description="a mean beside the scale of every group of signs; fit paper always has one")
    rounds: int = Field(
        5, ge=0, description="rounds in which values, signs and salience are fitted, after the sweep (default fit)"
    )
    tune_rate: float = Field(15e-3, gt=0, lt=1, description="tune: learning rate, relative to the size of a weight")

    @property
    def share(self) -> float:
        """Share of the weights, or of the inputs, that are salient."""
        if self.salient is not None:
            return self.salient
        return 0.24 if self.mask == "column" else 0.1

    @property
    def bits(self) -> int:
        """Bits of a salient weight."""
        return self.salient_bits or (4 if self.mask == "column" else 8)

    def label(self, method: str, stored: Collection[int] = ()) -> str:
        """As for every method."""
        what = " of inputs" if self.mask == "column" else ""
        told = f"{method} {100 * self.share:g}%{what} {self.bits}-bit {self.grouping(stored)}"
        return told + ("" if self.fit == "default" else f" {self.fit}") + self.extras


class GroupIntSettings(QuantizeSettings):
    """What gptq and rtn have in common: integers in groups."""

    bits: int = Field(4, ge=2, le=8, description="bits of a weight")
    group: int | Literal["row"] = Field(
        128,
        description="consecutive inputs that share a scale, or 'row'; where it does not divide a matrix, the nearest "
        "smaller number that does, or if that is less than half, the nearest larger one",
    )
    asymmetric: bool = Field(
        False,
        description="grids with a zero point (transformers reads these packed only if all matrices have the same "
        "width of groups, and with CompressedTensorsConfig(dequantize=True))",
    )
    clip: bool = Field(
        True,
        description="search every group's scale, and its sign, for the least error instead of taking its maximum",
    )

    def label(self, method: str, stored: Collection[int] = ()) -> str:
        """As for every method."""
        grids = " asymmetric" if self.asymmetric else ""
        return f"{method} {self.bits}-bit {self.grouping(stored)}{grids}{self.extras}"

    def width(self, n: int) -> int:
        """Return how many of a row's ``n`` inputs a group has; it divides ``n``, as compressed-tensors requires."""
        if self.group == "row" or self.group >= n:
            return n
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        below = max(d for d in divisors if d <= self.group)
        return below if 2 * below >= self.group else min(d for d in divisors if d > self.group)


class GptqSettings(GroupIntSettings):
    """GPTQ: integers, column by column, the rest of the row making up for the rounding."""

    act_order: bool = Field(
        True, description="settle the inputs with the largest second moment first: groups, and inputs within a group"
    )
    refine: int = Field(
        4, ge=0, description="rounds of coordinate descent on codes and scales after the sweep; 0 is GPTQ as published"
    )
    drift: float = Field(
        0.0,
        ge=0,
        le=1,
        description="aim at the outputs of the untouched model: make up for this share of what the inputs have drifted "
        "(GPTAQ: 0.25); costs a second pass of the calibration windows",
    )


class RtnSettings(GroupIntSettings):
    """Round to nearest: integers, every weight on its own."""

    @property
    def needs_data(self) -> bool:
        """Never."""
        return False


class FlexRoundSettings(RtnSettings):
    """FlexRound: rounding learned block by block, from round to nearest."""

    tune_steps: int = Field(200, ge=1, description=QuantizeSettings.model_fields["tune_steps"].description)

    @property
    def extras(self) -> str:
        """What was asked for on top of the method, which learns as it is."""
        return super().extras.replace(" learned", "", 1)


class AwqSettings(GroupIntSettings):
    """AWQ: inputs that matter are scaled up before rounding, and down again by what makes them."""

    steps: int = Field(
        20,
        ge=0,
        description="choices of scales tried for each input, by the sizes of inputs and weights; 0: none",
    )

    @model_validator(mode="after")
    def _folded_by_block(self) -> AwqSettings:
        if self.tune_mode == "end-to-end":
            raise ValueError("awq cannot learn end to end: its scales change the norms block by block")
        return self


QUANTIZE_METHODS: dict[str, type[QuantizeSettings]] = {
    "awq": AwqSettings,
    "flexround": FlexRoundSettings,
    "gptq": GptqSettings,
    "pb-llm": PbLlmSettings,
    "ptq161": Ptq161Settings,
    "rtn": RtnSettings,
    "trit-planes": TritPlanesSettings,
}
"""The settings class of every quantizing method. The methods themselves stand in ``METHODS``."""
