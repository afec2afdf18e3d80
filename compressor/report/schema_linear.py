"""The part of ``report.json`` about attention with a memory of constant size: how it was made, what was proved."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compressor.report.part import Part

Who = Literal["teacher", "student", "window", "memory"]
"""The model before; the linearized one; the linearized one with its windows (and sinks), or its memories, alone."""


class LayerScore(Part):
    layer: int = Field(description="index of the decoder block")
    score: float = Field(description="what the rule gave it")


class Selection(Part):
    rule: str = Field(description="how it was chosen which layers stay softmax attention")
    meaning: str = Field(default="", description="what a score is, in words")
    tokens: int = Field(default=0, description="calibration tokens that the scores were measured on")
    scores: list[LayerScore] = Field(default_factory=list, description="empty where nothing was measured")


class TransferPoint(Part):
    tokens: int = Field(description="tokens trained on so far")
    error: float = Field(description="relative error, mean over the step's batch")


class Transfer(Part):
    """Errors are |y - teacher's|^2 / |teacher's|^2 of the attention output, on held-out calibration text."""

    layer: int = Field(description="index of the decoder block")
    before: float = Field(description="relative error before training")
    after: float = Field(description="relative error after training")
    memory_before: float | None = Field(default=None, description="of the memory alone, before; null without one")
    memory_after: float | None = Field(default=None, description="of the memory alone, after; null without one")
    curve: list[TransferPoint] = Field(default_factory=list, description="error while training")


class DistillationPoint(Part):
    tokens: int = Field(description="tokens trained on so far")
    kl: float = Field(description="KL(teacher || student), nats per token")
    ce: float | None = Field(default=None, description="cross-entropy of the text, nats per token")
    stage: Literal[2, 3] = Field(default=2, description="3: on longer windows")


class LongWindows(Part):
    """The third stage: training end to end goes on, on longer windows."""

    tokens: int = Field(description="tokens trained on in it")
    seqlen: int = Field(description="tokens in a window")
    windows: int = Field(description="windows that it drew from")
    batch: int = Field(description="windows in a step")
    sha256: str = Field(description="SHA-256 of their token ids, windows in order")


class Distillation(Part):
    trained: str = Field(description="which weights were trained, in words")
    parameters: int = Field(description="number of trained parameters")
    tokens: int = Field(description="tokens trained on, in all")
    teacher: str = Field(default="", description="where the teacher's predictions came from, in words")
    stored_bytes: int | None = Field(
        default=None, description="bytes of the teacher's predictions on disk; null where the teacher was in memory"
    )
    longer: LongWindows | None = Field(default=None, description="the third stage; null without")
    curve: list[DistillationPoint] = Field(default_factory=list, description="losses while training")


class Exactness(Part):
    by_construction: bool = Field(description="whether texts that fit the window must give what softmax would give")
    tokens: int = Field(description="length of the texts")
    texts: int = Field(description="number of texts")
    to_teacher: float = Field(description="largest difference of a logit to the teacher")
    to_softmax: float | None = Field(
        default=None,
        description="largest difference to softmax attention with the student's own weights; null if not comparable",
    )
    allowed: float = Field(description="difference allowed for rounding")
    passed: bool | None = Field(default=None, description="null where it need not be exact, or not comparable")


class Agreement(Part):
    way: str = Field(description="a way to compute the same")
    tokens: int = Field(description="tokens compared")
    difference: float = Field(
        description="largest difference of a logit to one pass without a cache; for generated tokens, how much better "
        "another token would have been"
    )
    allowed: float = Field(description="difference allowed for rounding")
    passed: bool = Field(description="whether it was less")


class PositionRow(Part):
    who: Who = Field(description="which model, or which parts of it")
    whole: float = Field(description="perplexity over all positions")
    perplexities: list[float] = Field(description="perplexity within each bucket")


class Positions(Part):
    text: str = Field(description="name of the text")
    windows: int = Field(description="token windows evaluated")
    window: int = Field(description="tokens that are attended to exactly; the first bucket ends here")
    edges: list[int] = Field(description="tokens before a prediction at which each bucket ends, itself included")
    tokens: list[int] = Field(description="predictions in each bucket")
    rows: list[PositionRow] = Field(description="teacher, student, and its parts alone")
    gain: float | None = Field(
        default=None,
        description="what the memory gains beyond the window, nats per token; null where there is none",
    )
    gain_stderr: float | None = Field(default=None, description="its standard error over windows")


class RecallRow(Part):
    distance: int = Field(description="tokens from the first time to the second")
    windows: float = Field(description="the same in windows")
    beyond_context: bool = Field(description="whether the text is longer than the teacher's context")
    who: Who = Field(description="which model, or which parts of it")
    loss: float = Field(description="loss on the repeated passage, nats per token")
    gain: float = Field(description="fall of the loss on the repeated passage, nats per token")
    gain_stderr: float | None = Field(default=None, description="its standard error over trials")
    hits: float = Field(description="tokens of the repeated passage that were the first choice, 0..1")
    guessed: float = Field(description="the same where it did not stand there before")


class Recall(Part):
    passage: str = Field(description="what is repeated: random tokens of the text, or a passage of it")
    cue: int = Field(description="tokens of the passage that are given")
    target: int = Field(description="tokens of the passage that are predicted")
    trials: int = Field(description="texts at each distance")
    rows: list[RecallRow] = Field(default_factory=list, description="by distance, then by model")


class DecodeRow(Part):
    context: int = Field(description="tokens in the cache")
    teacher_ms: float = Field(description="median time of the next token, milliseconds")
    student_ms: float = Field(description="the same of the linearized model")
    teacher_bytes: int = Field(description="bytes of the cache of one text")
    student_bytes: int = Field(description="the same of the linearized model")


class Decode(Part):
    device: str = Field(description="where it was timed")
    dtype: str = Field(description="dtype of the weights")
    threads: int = Field(description="threads used")
    steps: int = Field(description="tokens timed at each context")
    rows: list[DecodeRow] = Field(default_factory=list, description="by context, as far as the time limit allowed")
    skipped: list[int] = Field(default_factory=list, description="contexts left out for want of time")
    state_bytes: int = Field(description="bytes that a linearized layer holds, whatever the context; mean over layers")
    teacher_bytes_per_token: float = Field(description="bytes a token adds to the teacher's cache")
    student_bytes_per_token: float = Field(description="the same of the linearized model")
    smaller_from: int | None = Field(default=None, description="context from which its cache is smaller; null: never")
    faster_from: int | None = Field(default=None, description="measured context from which it is faster; null: none")


class Sample(Part):
    prompt: str = Field(description="the text that was given")
    teacher: str = Field(description="how the teacher goes on, greedily")
    student: str = Field(description="how the linearized model goes on")
    same: int = Field(description="tokens until the two differ")


class Proof(Part):
    """What was measured on the finished model. A part is null where it was not asked for, or could not be done."""

    seconds: float = Field(description="time it took")
    exactness: Exactness | None = None
    agreement: list[Agreement] = Field(default_factory=list)
    positions: Positions | None = None
    recall: Recall | None = None
    decode: Decode | None = None
    samples: list[Sample] = Field(default_factory=list)
    left_out: list[str] = Field(default_factory=list, description="what was not measured, and why")


class Linearization(Part):
    method: str = Field(description="the method")
    mixer: dict[str, Any] = Field(description="what a linearized layer computes")
    own_code: bool = Field(default=True, description="whether loading needs compressor, or its file in the folder")
    linearized: list[int] = Field(description="decoder blocks whose attention has a memory of constant size")
    kept: list[int] = Field(default_factory=list, description="decoder blocks that keep softmax attention")
    selection: Selection | None = Field(default=None, description="null where the layers were given")
    transfer: list[Transfer] = Field(default_factory=list, description="training of each layer on its own")
    distillation: Distillation | None = Field(default=None, description="training end to end; null without")
    proof: Proof | None = Field(default=None, description="null when it was switched off")
