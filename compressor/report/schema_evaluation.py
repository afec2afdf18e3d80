"""The parts of ``report.json`` about quality: one text, and how the models do on it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compressor.report.part import Part


class EvaluationRow(Part):
    who: Literal["dense", "compressed", "baseline"] = Field(description="which model was measured")
    label: str = Field(description="its name for a reader")
    perplexity: float = Field(description="exp of the mean negative log likelihood of a token, nats")
    bits_per_byte: float | None = Field(default=None, description="bits per UTF-8 byte; comparable across tokenizers")
    kl: float | None = Field(default=None, description="mean KL(dense || this), nats per token; null for dense")
    top1: float | None = Field(default=None, description="how often its first choice is that of dense, 0..1")
    nll_per_window_stderr: float | None = Field(
        default=None, description="standard error of the mean negative log likelihood over windows, nats"
    )


class Evaluation(Part):
    name: str = Field(description="name of the text")
    protocol: dict[str, Any] = Field(
        description="seqlen, stride, BOS, ...: under other ones perplexities do not compare"
    )
    text_sha256: str = Field(default="", description="SHA-256 of the text in UTF-8")
    tokens_sha256: str = Field(default="", description="SHA-256 of the token ids; equal means comparable")
    windows: int = Field(description="token windows evaluated")
    tokens: int = Field(description="tokens predicted")
    in_domain: bool = Field(description="whether the text is of the kind the model was calibrated on")
    in_domain_reason: str = Field(default="", description="why that is said")
    rows: list[EvaluationRow] = Field(description="dense, compressed and baseline on this text")
