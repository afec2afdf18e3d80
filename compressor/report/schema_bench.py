"""The schema of what ``compressor bench`` measures: a model and the one it was made from, in one process."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compressor.report.part import Part


class BenchPrefill(Part):
    prompt: int = Field(description="tokens read at once, in every row of the batch")
    batch: int = Field(description="rows")
    seconds: float = Field(description="median time")
    tokens_per_second: float = Field(description="prompt * batch / seconds")
    speedup: float | None = Field(default=None, description="this time / the model's; null for the model itself")


class BenchDecode(Part):
    context: int = Field(description="tokens before the first one that is timed")
    batch: int = Field(description="rows")
    seconds: float = Field(description="median time of a step, which gives every row a token")
    tokens_per_second: float = Field(description="batch / seconds")
    weight_bytes: int = Field(description="bytes of weights that a step reads, as they are held in memory")
    cache_bytes: int = Field(description="bytes of the cache, on the average over the steps; a step reads all of it")
    bytes_per_second: float = Field(description="(weight_bytes + cache_bytes) / seconds")
    bandwidth_fraction: float = Field(description="bytes_per_second / that of plain reading, measured beside it")
    speedup: float | None = Field(default=None, description="this time / the model's; null for the model itself")


class BenchWay(Part):
    """One model in one dtype, multiplied in one way."""

    name: Literal["model", "base", "base in bfloat16", "base, our product"] = Field(description="who was measured")
    dtype: str = Field(description="dtype of the activations and of what is not packed")
    products: dict[str, int] = Field(description="how many linear layers are multiplied in which way")
    reasons: dict[str, int] = Field(
        default_factory=dict, description="why packed layers are not multiplied in the way asked for -> how many"
    )
    load_seconds: float | None = Field(description="from_pretrained, layouts included; null: shares another's tensors")
    held_bytes: int = Field(description="bytes of the weights in memory: parameters, packed parts, layouts")
    layout_bytes: int = Field(description="those of the layouts alone")
    prefill: list[BenchPrefill] = Field(default_factory=list)
    decode: list[BenchDecode] = Field(default_factory=list)


class Bandwidth(Part):
    bytes_per_second: float = Field(description="the best of several passes over memory that no cache holds")
    how: str = Field(description="what was timed")
    bytes: int = Field(description="of the memory that was passed over")


class Bench(Part):
    schema_version: Literal[1] = 1
    version: str = Field(description="version of compressor that wrote this")
    command: str = Field(description="the command line as typed, absolute home folders replaced by ~")
    started: str = Field(description="ISO 8601 in UTC")
    model: str = Field(description="name of the folder, or hub id")
    architecture: str
    parameters: int = Field(description="distinct parameters")
    disk_bytes: int = Field(description="bytes of its weight files")
    base: str | None = Field(description="name of the model it is held against; null: none")
    notes: list[str] = Field(default_factory=list, description="what was left out, and why")
    device: str
    threads: int
    rung: str = Field(description="how packed layers are to be multiplied on CPUs")
    rung_reason: str = Field(description="why so")
    activations: Literal["int8", "exact"]
    steps: int = Field(description="tokens timed one by one for each context and batch, the models taking turns")
    bandwidth: Bandwidth
    peak_rss_bytes: int = Field(description="largest resident set with the model alone, everything of Python included")
    peak_device_bytes: int | None = Field(default=None, description="largest allocation of it on an accelerator")
    ways: list[BenchWay] = Field(description="the model first")
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: float = Field(description="of the whole measurement")
