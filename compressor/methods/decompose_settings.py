"""The settings of the decomposing methods: one frozen class each; the descriptions are help and recipe schema."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compressor.methods.settings import valid_regexes

RESIDUAL_RANK = 16
"""Where what a product leaves out is kept beside it, and no rank is asked for."""

SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the bytes that ``"750MB"`` or ``"1.5 GiB"`` stands for.

    Raises:
        ValueError: ``text`` is no size; the message says what was expected.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in SIZE_UNITS:
        raise ValueError(f"{text!r} should be a size such as 750MB or 1.5GiB")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


class DecomposeSettings(BaseModel):
    """What every decomposing method takes. One of `keep_params`, `target_size` and `rank`; keep_params 0.8 by default.

    Where a product of factors would be no smaller than the matrix, the matrix stays as it is. With `residual` there is
    no budget, only a rank, 16 by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    keep_params: float | None = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the parameters of all matrices that is kept (0.8 by default); parameters of factors in "
        "8 or 4 bits count as half or a quarter, and their scales as what they take",
    )
    target_size: str | None = Field(
        None, description="size of the weight files, such as 750MB, instead of keep_params: everything in them counts"
    )
    rank: int | None = Field(None, ge=1, description="the same rank for every matrix, instead of keep_params")
    ranks: Literal["uniform", "energy", "welore", "dobi"] = Field(
        "uniform",
        description="uniform: the same share of every matrix; energy: where it costs the least loss, by the curvature "
        "of the loss on the calibration text; welore: one threshold on all normalised spectra; dobi: positions learned "
        "on the calibration text",
    )
    residual: bool = Field(
        False,
        description="keep beside the product what it leaves out, as a dense matrix: nothing is lost and nothing is "
        "saved; for fine-tuning the product as an adapter",
    )
    factor_bits: Literal[16, 8, 4] = Field(16, description="bits of the factors' entries; 16 is fp16")
    include: tuple[str, ...] = Field((), description="decompose only modules whose name matches one of these regexes")
    exclude: tuple[str, ...] = Field((), description="leave out modules whose name matches one of these regexes")
    damp: float = Field(
        0.01, gt=0, lt=1, description="damping of second moments where they are inverted, relative to their diagonal"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_share(cls, data: Any) -> Any:
        if isinstance(data, dict) and all(data.get(key) is None for key in ("keep_params", "target_size", "rank")):
            kept = data.get("residual", cls.model_fields["residual"].default)
            return {**data, **({"rank": RESIDUAL_RANK} if kept else {"keep_params": 0.8})}
        return data

    @field_validator("target_size")
    @classmethod
    def _check_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("include", "exclude")
    @classmethod
    def _check_regexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return valid_regexes(value)

    @model_validator(mode="after")
    def _check_together(self) -> DecomposeSettings:
        given = [key for key in ("keep_params", "target_size", "rank") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one")
        if self.residual:
            if given != ["rank"]:
                raise ValueError(f"{given[0]} is no budget where all is kept: give rank, or no residual")
            if self.ranks != "uniform":
                raise ValueError(f"ranks {self.ranks} has no budget where all is kept: give rank, or no residual")
            if self.factor_bits != 16:
                raise ValueError(f"factor_bits {self.factor_bits} is not for a product beside its residual: give 16")
        if self.rank is not None and self.ranks != "uniform":
            raise ValueError(f"rank {self.rank} is for every matrix, and ranks {self.ranks} chooses: give one")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether calibration inputs are needed: for the fit, or to choose ranks."""
        return True

    @property
    def needs_dense(self) -> bool:
        """Whether the calibration windows are also sent through the untouched model while it is decomposed."""
        return False

    @property
    def surveyed(self) -> bool:
        """Whether the whole model is looked at before the first matrix is decomposed."""
        return self.rank is None and self.ranks != "uniform"

    @property
    def budget(self) -> str:
        """What is asked for, in a few words."""
        if self.rank is not None:
            return f"rank {self.rank}"
        return self.target_size or f"{self.keep_params:.0%}"

    def label(self, method: str) -> str:
        """The stage in a few words."""
        ranks = f" {self.ranks}" if self.surveyed and self.ranks != method else ""
        ranks += " joint" if getattr(self, "joint", False) else ""
        bits = "" if self.factor_bits == 16 else f" {self.factor_bits}-bit factors"
        residual = " + residual" if self.residual else ""
        return f"{method}{ranks} {self.budget}{bits}{residual}"


class SvdSettings(DecomposeSettings):
    """Plain SVD: the best product of that rank for the weights alone. No data needed."""

    ranks: Literal["uniform", "welore"] = Field(
        "uniform", description=DecomposeSettings.model_fields["ranks"].description
    )

    @property
    def needs_data(self) -> bool:
        """Never."""
        return False


class WeloreSettings(SvdSettings):
    """WeLore: plain SVD, ranks by one threshold on all normalised spectra; made for fine-tuning the factors."""

    ranks: Literal["welore"] = Field("welore", description=DecomposeSettings.model_fields["ranks"].description)


class AsvdSettings(DecomposeSettings):
    """ASVD: SVD of the weights times a power of the mean size of their inputs."""

    ranks: Literal["uniform"] = Field("uniform", description=DecomposeSettings.model_fields["ranks"].description)
    alpha: float = Field(0.5, ge=0, le=2, description="power of the mean size of an input")


class SvdLlmSettings(DecomposeSettings):
    """The best product of that rank for the outputs on the calibration text (SVD-LLM, in closed form)."""

    ranks: Literal["uniform", "energy", "welore", "dobi"] = Field(
        "energy", description=DecomposeSettings.model_fields["ranks"].description
    )
    fit: Literal["default", "paper"] = Field(
        "default",
        description="default: errors weighted by what they cost at the loss, fitted to the outputs of the untouched "
        "model, layer after layer; paper: as published, from the inputs of the untouched model, with uniform ranks",
    )
    dense_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the untouched model's inputs in the statistics; the rest is of the inputs behind what is "
        "already decomposed (fit paper: 1)",
    )
    weighting: Literal["loss", "output"] = Field(
        "loss", description="what an error of an output counts: what it costs at the loss, or every one the same"
    )
    drift: float = Field(
        0.5,
        ge=0,
        le=1,
        description="aim at the outputs of the untouched model: share of what the inputs have drifted that is made up "
        "for",
    )
    in_order: bool = Field(
        True, description="settle the matrices of a block one after the other, each on inputs that the others have made"
    )
    joint: bool = Field(
        False,
        description="ranks energy: let matrices that read the same input (q, k, v; gate, up) share their right factor "
        "where that is cheaper; such products cannot be quantized by a later stage",
    )
    rounds: int = Field(
        5, ge=1, le=10, description="how often ranks are chosen, each time on the model as truncated the time before"
    )
    steps: int = Field(60, ge=1, description="dobi: steps of learning the positions of truncation")
    refit: bool = Field(
        False,
        description="afterwards fit the left factor to the inputs behind what is already decomposed, by least squares "
        "(the local update of SVD-LLM; without dense_share the factors are fitted to these already)",
    )
    bias: bool = Field(True, description="change the biases of layers that have one so that the mean output stays")

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("fit") == "paper":
            plain = {"ranks": "uniform", "dense_share": 1.0, "weighting": "output", "drift": 0.0, "in_order": False}
            return {**plain, "bias": False, **data}
        ranked = isinstance(data, dict) and (data.get("rank") is not None or data.get("residual"))
        if ranked and cls.model_fields["ranks"].default == "energy" and "ranks" not in data:
            return {**data, "ranks": "uniform"}
        return data

    @model_validator(mode="after")
    def _check_joint(self) -> SvdLlmSettings:
        if self.joint and (self.ranks != "energy" or self.target_size is not None):
            raise ValueError("joint products are for ranks energy and a budget of keep_params")
        return self

    @property
    def needs_dense(self) -> bool:
        """For drift, and for statistics of the untouched model; with a residual nothing is changed."""
        return not self.residual and (self.drift > 0 or self.dense_share > 0)

    @property
    def surveyed(self) -> bool:
        """To choose ranks, and to find out what errors cost at the loss."""
        return super().surveyed or self.weighting == "loss"

    def label(self, method: str) -> str:
        """The stage in a few words."""
        return super().label(method) + ("" if self.fit == "default" else f" {self.fit}")


class DobiSettings(SvdLlmSettings):
    """Dobi-SVD: as svd-llm, and how many components each matrix keeps is learned on the calibration text."""

    ranks: Literal["dobi"] = Field("dobi", description=DecomposeSettings.model_fields["ranks"].description)
    fit: Literal["default", "paper"] = Field(
        "default",
        description="how positions of truncation are learned. default: on components fixed beforehand, in the budget "
        "at every step, never worse than by energy on windows held out; paper: as published, with an SVD of every "
        "output in every step, for comparison; it wants thousands of steps",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        return data  # what is published of svd-llm is not meant here


class CordaSettings(DecomposeSettings):
    """CorDA: components ordered by what they do on the calibration text, to be fine-tuned as an adapter."""

    ranks: Literal["uniform"] = Field("uniform", description=DecomposeSettings.model_fields["ranks"].description)
    residual: bool = Field(True, description=DecomposeSettings.model_fields["residual"].description)
    components: Literal["largest", "smallest"] = Field(
        "largest",
        description="which of them make the product: largest, to learn more of what the calibration text is about; "
        "smallest, to keep what it knows while something else is learned (with a residual)",
    )

    @model_validator(mode="after")
    def _check_components(self) -> CordaSettings:
        if self.components == "smallest" and not self.residual:
            raise ValueError("the smallest components alone are no model: leave residual on, or take the largest")
        return self

    def label(self, method: str) -> str:
        """The stage in a few words."""
        return super().label(f"{method} smallest" if self.components == "smallest" else method)


class TransactSettings(DecomposeSettings):
    """TransAct: MLPs with fewer neurons, values with fewer dimensions; a plainly smaller model for any runtime.

    Which class of transformers can say this decides what can be asked for: all layers get the same widths.
    """

    keep_params: float | None = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the parameters of MLPs, value and output projections that is kept; neurons make up for "
        "what values leave (0.8 by default, unless mlp is given)",
    )
    mlp: float | None = Field(None, gt=0, le=1, description="share of the neurons of an MLP, instead of keep_params")
    values: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the dimensions of an attention value; the cache of keys and values shrinks with it, and "
        "the model becomes one of the class mimo_v2_flash, which computes the same",
    )
    multiple: int = Field(1, ge=1, description="neurons are kept in multiples of this, say 64 for an accelerator")
    target_size: None = Field(None, description=DecomposeSettings.model_fields["target_size"].description)
    rank: None = Field(None, description=DecomposeSettings.model_fields["rank"].description)
    residual: Literal[False] = Field(False, description=DecomposeSettings.model_fields["residual"].description)
    ranks: Literal["uniform"] = Field("uniform", description=DecomposeSettings.model_fields["ranks"].description)
    factor_bits: Literal[16] = Field(16, description=DecomposeSettings.model_fields["factor_bits"].description)

    @model_validator(mode="before")
    @classmethod
    def _default_share(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("keep_params") is None and data.get("mlp") is None:
            return {**data, "keep_params": 0.8}
        return data

    @model_validator(mode="after")
    def _check_widths(self) -> TransactSettings:
        if self.keep_params is not None and self.mlp is not None:
            raise ValueError("keep_params and mlp exclude each other: give one")
        if self.mlp == 1 and self.values == 1:
            raise ValueError("mlp 1 and values 1 leave everything as it is")
        if self.include or self.exclude:
            raise ValueError("all layers get the same widths: include and exclude do not go with transact")
        return self

    @property
    def budget(self) -> str:
        """What is asked for, in a few words."""
        told = f"{self.keep_params:.0%}" if self.keep_params is not None else f"neurons {self.mlp:.0%}"
        return told if self.values == 1 else f"{told} values {self.values:.0%}"


DECOMPOSE_METHODS: dict[str, type[DecomposeSettings]] = {
    "svd": SvdSettings,
    "asvd": AsvdSettings,
    "svd-llm": SvdLlmSettings,
    "dobi": DobiSettings,
    "welore": WeloreSettings,
    "corda": CordaSettings,
    "transact": TransactSettings,
}
"""The settings class of every decomposing method."""
