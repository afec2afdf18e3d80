"""The schema of ``report.json``. Every number a person is shown stands here first; the pages only render it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compressor.report.part import Part
from compressor.report.schema_chain import EarlierRun, StageResult
from compressor.report.schema_evaluation import Evaluation as Evaluation
from compressor.report.schema_evaluation import EvaluationRow as EvaluationRow
from compressor.report.schema_linear import Linearization
from compressor.report.schema_use import Exported, Runtime, Sample, TaskResult

SCHEMA_VERSION = 1

Group = Literal[
    "compressed linears",
    "kept linears",
    "attention memory",
    "embeddings",
    "norms and others",
    "carried over",
    "container",
    "config, tokenizer, reader",
]
"""The groups of the size ledger, in the order they are shown. ``attention memory`` is what linearizing adds;
``container`` is safetensors headers and padding."""

GROUPS: tuple[Group, ...] = (
    "compressed linears",
    "kept linears",
    "attention memory",
    "embeddings",
    "norms and others",
    "carried over",
    "container",
    "config, tokenizer, reader",
)

LINEARS: tuple[Group, ...] = ("compressed linears", "kept linears")


class Tool(Part):
    version: str = Field(description="version of compressor that wrote this")
    command: str = Field(description="the command line as typed, absolute paths cut to what tells them apart")
    started: str = Field(description="start of the run, ISO 8601 in UTC")
    seconds: float = Field(description="wall-clock time of the whole run, seconds")


class Model(Part):
    source: str = Field(description="hub id, or the name (not the path) of the source folder")
    revision: str | None = Field(default=None, description="commit of a source from the hub; null for a folder")
    sha256: str | None = Field(
        default=None,
        description="SHA-256 of the source's config and of all its tensors (name, dtype, shape, data), names in order",
    )
    model_type: str = Field(description="model_type of the source's config.json")
    architecture: str = Field(description="first entry of the source's architectures")
    blocks: int = Field(description="number of decoder blocks")
    parameters: int = Field(description="distinct parameters; tied tensors are counted once")
    linear_parameters: int = Field(description="parameters of the linear maps inside the decoder blocks")
    dtype: str = Field(description="dtype of the source's weights")
    tied_embeddings: bool = Field(description="whether the output head is the input embedding")
    vocabulary: int = Field(description="rows of the embedding")


class Calibration(Part):
    sources: list[dict[str, Any]] = Field(description="one object for each text mixed in: spec, weight, documents, ...")
    nsamples: int = Field(description="number of token windows")
    seqlen: int = Field(description="tokens in one window")
    seed: int = Field(description="seed of the sampling of windows")
    tokens: int = Field(description="tokens seen in total")
    sha256: str = Field(description="SHA-256 of the token ids, windows in order")


class LedgerRow(Part):
    group: Group = Field(description="what kind of bytes these are")
    format: str = Field(description="how they are stored, such as bitmask or bfloat16")
    tensors: int = Field(default=0, description="number of source tensors in this row")
    parameters: int = Field(default=0, description="source parameters they stand for; 0 for headers and files")
    stored_parameters: int | None = Field(
        default=None,
        description="parameters as they are stored: of a product the entries of its factors; null in older reports",
    )
    bytes: int = Field(description="bytes of the output")
    source_bytes: int | None = Field(
        default=None, description="bytes of the same things in the source; null if unknown"
    )
    bits_per_weight: float | None = Field(default=None, description="8 * bytes / parameters; null without parameters")
    share: float = Field(description="bytes as a fraction of all ledger bytes, 0..1")


class Size(Part):
    source_bytes: int = Field(description="bytes of the source's weight files: tensors and headers")
    output_bytes: int = Field(description="accounted bytes of the output's weight files: tensors and headers")
    weights_bytes: int = Field(description="accounted bytes of the output's tensors alone")
    disk_bytes: int = Field(description="measured size of all files of the output folder, reports and card left out")
    bits_per_weight_linears: float = Field(description="bits of all decoder linears / their source parameters")
    bits_per_weight_model: float = Field(description="bits of all tensors / distinct source parameters")
    source_bits_per_weight: float = Field(description="bits of all source tensors / distinct parameters")
    source_stored_parameters: int | None = Field(
        default=None,
        description="parameters of the source as they are stored there; null in older reports, where it was plain",
    )
    ledger: list[LedgerRow] = Field(description="the output by group and format")
    kv_bytes_per_token: int | None = Field(
        default=None, description="bytes a token adds to the cache of keys and values, where narrowing changed them"
    )
    source_kv_bytes_per_token: int | None = Field(default=None, description="the same of the source")


class Layer(Part):
    name: str = Field(description="module path in the transformers model")
    block: int = Field(description="index of its decoder block")
    kind: str = Field(description="path within its block, numbers of experts as *: self_attn.q_proj")
    shape: tuple[int, int] = Field(description="(outputs, inputs)")
    method: str = Field(description="the method that made it, or 'kept'")
    format: str = Field(description="how it is stored")
    sparsity: float = Field(description="fraction of exact zeros, 0..1")
    bits_per_weight: float = Field(description="8 * bytes / (outputs * inputs), everything it needs counted")
    bytes: int = Field(description="bytes of all its parts on disk")
    relative_error: float | None = Field(
        default=None, description="tr((W-Q) H (W-Q)^T) / tr(W H W^T) on the calibration inputs; null without data"
    )
    tokens: int | None = Field(default=None, description="calibration tokens that reached it; null without data")
    seconds: float = Field(default=0.0, description="time of its solve, seconds")
    component: Literal["LRC", "N-LRC"] | None = Field(
        default=None, description="WeLore's class: a low-rank component, to be fine-tuned, or none; null without them"
    )
    notes: list[str] = Field(default_factory=list, description="sentences about anything unusual")
    rungs: list[str] = Field(default_factory=list, description="what the factorization had to try before it worked")
    fallback: str | None = Field(default=None, description="what was done instead of what was asked, and why")


class Baseline(Part):
    """Plain rounding to as many bytes as the compressed model has: the yardstick every result is held against."""

    label: str = Field(description="such as '7-bit round-to-nearest, groups of 128'")
    bits_per_weight: float = Field(description="of the decoder linears")
    bytes: int = Field(description="accounted bytes of the whole baseline model")
    verdict: str = Field(description="one sentence: would plain rounding at the same bytes have been better?")
    better: bool | None = Field(default=None, description="whether the baseline won; null when the texts disagree")


class KernelCost(Part):
    """The written model as the kernels multiply with it, against the same model multiplied exactly: the same windows,
    the same process."""

    rung: str = Field(description="which kernels, such as avx512")
    activations: Literal["int8", "exact"] = Field(description="what becomes of activations on the way")
    layers: dict[str, int] = Field(description="how many packed layers are multiplied in which way")
    text: str = Field(description="name of the text")
    windows: int = Field(description="token windows measured")
    seqlen: int = Field(description="tokens in one of them")
    exact_perplexity: float = Field(description="multiplied exactly, on these windows")
    perplexity: float = Field(description="by the kernels, token by token as in generation, on these windows")
    kl: float = Field(description="mean KL(exact || kernels), nats per token")
    top1: float = Field(description="how often their first choices are the same, 0..1")
    prompt_perplexity: float = Field(description="by the kernels, all tokens at once: others, or none, are used then")
    prompt_kl: float = Field(description="as kl")
    prompt_top1: float = Field(description="as top1")
    seconds: float = Field(description="time it took, seconds")


class Verification(Part):
    passed: bool = Field(description="whether a fresh process reproduced the logits from the written folder")
    mode: Literal["whole model", "block by block"] = Field(description="what was held against what")
    route: str = Field(description="how the folder was loaded, such as 'import compressor'")
    max_abs_difference: float = Field(description="largest difference of a logit (or hidden state)")
    tokens: int = Field(description="tokens compared")
    seconds: float = Field(description="time it took, seconds")
    kernels: KernelCost | None = Field(
        default=None, description="what rounding activations for the kernels costs; null where it was not measured"
    )
    kernels_skipped: str | None = Field(
        default=None, description="why not; null where it was, or nothing is stored that kernels multiply with"
    )


class Timing(Part):
    what: str
    seconds: float


class Memory(Part):
    peak_rss_bytes: int = Field(description="largest resident set of the process")
    peak_device_bytes: int | None = Field(default=None, description="largest allocation on the accelerator")
    predicted_bytes: int | None = Field(default=None, description="what plan had predicted")


class Expert(Part):
    module: str = Field(description="path of the mixture")
    expert: int
    tokens: int = Field(description="calibration tokens routed to it")
    fallback: str | None = Field(default=None, description="what was done for want of tokens")


class Resumed(Part):
    blocks: int = Field(description="blocks taken over from an interrupted run")
    times: int = Field(default=1, description="how often the run was interrupted")


class Report(Part):
    schema_version: Literal[1] = 1
    tool: Tool
    model: Model
    recipe: dict[str, Any] = Field(description="the whole resolved recipe, defaults filled in")
    calibration: Calibration | None = Field(default=None, description="null for a data-free run")
    size: Size
    layers: list[Layer]
    evaluation: list[Evaluation] = Field(default_factory=list)
    baseline: Baseline | None = Field(default=None, description="null when nothing was evaluated, or made smaller")
    verification: Verification | None = Field(default=None, description="null only when it was switched off")
    linearization: Linearization | None = Field(
        default=None, description="null unless attention was replaced by attention with a memory of constant size"
    )
    runtimes: list[Runtime] = Field(default_factory=list, description="programs that loaded it and gave the same")
    tasks: list[TaskResult] = Field(default_factory=list, description="results of the evaluation harness")
    samples: list[Sample] = Field(default_factory=list, description="prompts, and how the models go on")
    samples_skipped: str | None = Field(default=None, description="why there are none; null where none were asked for")
    exported: Exported | None = Field(default=None, description="null unless this folder is an export of another")
    stages: list[StageResult] = Field(
        default_factory=list, description="the stages of the recipe, in order, with what each left behind"
    )
    history: list[EarlierRun] = Field(
        default_factory=list, description="runs that made the source, oldest first; empty where it is an original"
    )
    timings: list[Timing] = Field(default_factory=list)
    memory: Memory | None = None
    versions: dict[str, str] = Field(default_factory=dict, description="python and packages")
    machine: dict[str, Any] = Field(default_factory=dict, description="processor, cores, memory, accelerator")
    seeds: dict[str, int] = Field(default_factory=dict)
    threads: int = 1
    resumed: Resumed | None = Field(default=None, description="null for an uninterrupted run")
    experts: list[Expert] = Field(default_factory=list)
    carried_over: list[str] = Field(default_factory=list, description="tensors no module owns, copied unchanged")
    warnings: list[str] = Field(default_factory=list)
    fallbacks: list[str] = Field(
        default_factory=list, description="every place where something else was done than asked"
    )
