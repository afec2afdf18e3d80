"""What the report says of a linearization: how it was trained, which layers, and what was proved of the result."""

from __future__ import annotations

from typing import Any

from compressor.engine.limits import available_memory
from compressor.kernels.native import using
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.report.schema_linear import (
    Distillation,
    DistillationPoint,
    LayerScore,
    Linearization,
    LongWindows,
    Proof,
    Selection,
    Transfer,
    TransferPoint,
)
from compressor.run.linear_models import load_dense
from compressor.run.linear_target import target_of
from compressor.run.network import load_whole
from compressor.run.proof import prove
from compressor.run.session import Run

MEANINGS = {
    "kl-add": "KL divergence from the dense model when this layer alone gets its softmax back; the smallest stay",
    "kl-replace": "KL divergence from the dense model when this layer alone is linearized; the largest stay",
    "error": "relative error of the layer's output after attention transfer; the largest stay",
    "even": "evenly spaced; the scores, relative errors, were not used",
}
TRAINED = {
    "lora": "low-rank updates of q, k, v, o, and what is new",
    "full": "all weights",
    "none": "nothing",
}


def linearization(run: Run, layers: list[int], proof: Proof | None) -> Linearization:
    """Put together what the journal knows and what was proved.

    Args:
        layers: those that are linearized.
    """
    stage, facts = run.recipe.stages[0], run.journal.facts
    target = target_of(stage, run.skeleton)
    settings = stage.settings
    assert isinstance(settings, LinearizeSettings)
    transfers = [
        Transfer(
            layer=layer,
            before=record["transfer"]["before"],
            after=record["transfer"]["after"],
            memory_after=record["transfer"]["memory"],
            curve=[TransferPoint(tokens=tokens, error=error) for tokens, error in record["transfer"]["curve"]],
        )
        for layer, record in enumerate(run.journal.blocks)
        if "transfer" in record
    ]
    named = bool(settings.keep_layers) or not facts["kept"]
    selection = Selection(
        rule="as asked for" if named else settings.select,
        meaning="" if named else MEANINGS[settings.select],
        tokens=0 if named or settings.select in ("error", "even") else _scored_tokens(run, settings),
        scores=[LayerScore(layer=layer, score=score) for layer, score in enumerate(facts["scores"])],
    )
    return Linearization(
        method=stage.name,
        mixer=target.content(),
        own_code=target.container != "plain",
        linearized=layers,
        kept=list(facts["kept"]),
        selection=selection,
        transfer=transfers,
        distillation=_distillation(run, facts.get("distilled"), settings),
        proof=proof,
    )


def _scored_tokens(run: Run, settings: LinearizeSettings) -> int:
    assert run.inputs.calibration is not None
    windows, length = run.inputs.calibration.ids.shape
    return min(windows, max(1, settings.select_tokens // length)) * length


def _distillation(run: Run, fact: dict[str, Any] | None, settings: LinearizeSettings) -> Distillation | None:
    if fact is None:
        return None
    teacher = "the teacher, beside the student"
    if settings.store_logits:
        teacher = f"the {settings.top_k} largest predictions of the teacher for each token, on disk"
    short, points = fact["short"], fact["curve"]
    return Distillation(
        trained=TRAINED[fact["trained"]],
        parameters=fact["parameters"],
        tokens=points[-1][0] if points else 0,
        teacher=teacher,
        stored_bytes=run.journal.facts["logits bytes"] if settings.store_logits else None,
        longer=_longer(run, points[-1][0] - short),
        curve=[DistillationPoint(tokens=at, kl=kl, ce=ce, stage=3 if at > short else 2) for at, kl, ce in points],
    )


def _longer(run: Run, tokens: int) -> LongWindows | None:
    longer, drawn = run.plan.longer, run.inputs.longer
    if longer is None or drawn is None:
        return None
    windows, length = drawn.ids.shape
    return LongWindows(tokens=tokens, seqlen=length, windows=windows, batch=longer.batch, sha256=drawn.sha256)


def proved(run: Run) -> tuple[Proof | None, list[str]]:
    """Load both models and measure; or say why that was not done.

    Returns:
        The proof, and warnings for the report.
    """
    if not run.recipe.verify or run.inputs.texts is None:
        return None, ["the verification table is missing: nothing was evaluated, or verification was switched off"]
    needed = 3 * run.skeleton.parameters() * run.plan.dtype.itemsize
    if needed > available_memory():
        return None, [f"the verification table is missing: both models together need {needed / 1e9:.1f} GB of memory"]
    device, trust = run.plan.device, run.options.trust_remote_code
    dense = load_dense(run.skeleton, run.plan.dtype, device, trust_remote_code=trust)
    with using("packed"):  # as the dense model
        student = load_whole(run.folder, dtype=run.plan.dtype, device=device)
    text = run.inputs.texts.texts[0]
    ids = run.inputs.texts.ids[run.inputs.texts.span(0)]
    with run.voice.meanwhile("proving") as say:
        tokenizer = run.inputs.tokenizer
        proof = prove(
            dense, student, ids, tokenizer=tokenizer, text=text.name, say=lambda what: say(f"proving: {what}")
        )
    return proof, []
