"""The parts of ``report.json`` about using the result: what loads it, what it can do, what it says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.report.part import Part


class Runtime(Part):
    """A program that loaded the folder and was held against what was written; only what was run stands here."""

    name: str = Field(description="such as 'transformers', 'transformers + compressor', 'llama.cpp', 'mlx'")
    version: str = Field(description="of that program; several packages as 'name version, name version'")
    form: str = Field(description="what it loaded, such as 'packed', 'dense', 'gguf Q4_0'")
    command: str = Field(description="what loads it, exactly; PATH stands for the folder or file")
    language: Literal["python", "shell"] = Field(default="python", description="of the command")
    check: str = Field(description="what was compared, in words")
    difference: float | None = Field(default=None, description="the figure of that comparison; null without one")
    allowed: float | None = Field(default=None, description="the largest one that passes")
    passed: bool = Field(description="whether it was close enough")


class TaskResult(Part):
    """One metric of one task of EleutherAI's evaluation harness, or of a group of tasks."""

    task: str = Field(description="name of the task, or of the group")
    members: list[str] = Field(default_factory=list, description="of a group, the tasks it is made of")
    metric: str = Field(description="such as acc, acc_norm, exact_match")
    value: float = Field(description="as the harness gives it, 0..1 for shares")
    stderr: float | None = Field(default=None, description="its standard error; null where it is no mean")
    chance: float | None = Field(default=None, description="what guessing gives; null where nothing can be guessed")
    corrected: float | None = Field(default=None, description="(value - chance) / (1 - chance); null without chance")
    base: float | None = Field(default=None, description="the same of the model it was made from; null if not run")
    difference_stderr: float | None = Field(
        default=None, description="standard error of value - base, question by question; null without base"
    )
    p: float | None = Field(
        default=None, description="how often chance alone makes such a difference; null without base"
    )
    verdict: str = Field(default="", description="what it says, in words; empty where there is nothing to add")
    samples: int = Field(description="how many were answered")
    total: int | None = Field(default=None, description="how many the task has; null if unknown")
    shots: int | None = Field(
        default=0, description="examples before each question; null where the tasks of a group differ"
    )
    output_type: str = Field(description="of the harness: multiple_choice, loglikelihood, generate_until, ...; group")
    harness: str = Field(description="version of lm-eval")
    tokens_sha256: str = Field(default="", description="SHA-256 of the questions; equal means comparable")
    before_export: bool = Field(
        default=False, description="whether the folder that this one was exported from has answered"
    )


class Sample(Part):
    """One prompt, and how two models go on, greedily."""

    prompt: str
    dense: str | None = Field(description="what the source model says; null if it was not asked")
    compressed: str = Field(description="what the written model says")


class Exported(Part):
    """A folder that ``compressor export`` wrote from another."""

    form: str = Field(description="such as dense, 'gguf Q4_0', mlx, gptq, compressed-tensors")
    file_bytes: int = Field(description="bytes of its weight files")
    disk_bytes: int | None = Field(default=None, description="bytes of all its files but report and card")
    bits_per_weight_linears: float | None = Field(default=None, description="bits of the decoder linears / parameters")
    bits_per_weight_model: float | None = Field(default=None, description="bits of all tensors / parameters")
    exact: bool = Field(description="whether every matrix has the same values as in the folder it was made from")
    notes: list[str] = Field(default_factory=list, description="what was rounded, left out, renamed")
    files: list[str] = Field(
        default_factory=list, description="names of the files it was written with, but for the card"
    )
    source: str = Field(default="", description="name of the folder it was made from")
    made_for: str = Field(default="", description="how to load it in what it was not tried with, in Markdown")
    library: str | None = Field(default=None, description="what a hub calls the library that loads it; null without")
    tag: str | None = Field(default=None, description="of a hub, for the form; null where it has none")
