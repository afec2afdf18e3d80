"""The token windows of a run: what it is calibrated on, what it is judged on, and the probe that verifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import TokenWindows, load_calibration
from compressor.engine.checkpoint import EMBEDDED
from compressor.errors import UserError
from compressor.kernels.native import using
from compressor.run.longer import load_longer
from compressor.run.measure import RUN_WORDS, Texts, default_texts, load_texts
from compressor.run.network import load_whole
from compressor.run.plan import Plan, context_length
from compressor.run.progress import Voice

PROBE_TOKENS = 64


@dataclass(frozen=True)
class Inputs:
    """Token windows, and the tokenizer they were made with (``None`` when no text was needed).

    Attributes:
        longer: windows of a third stage of linearization, where there is one.
    """

    tokenizer: Any
    calibration: TokenWindows | None
    texts: Texts | None
    longer: TokenWindows | None = None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")) and not any(folder.glob("vocab*")):
        raise UserError(
            f"{folder.name} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)",
            fix="add the tokenizer that belongs to the model",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load the tokenizer of {folder.name}: {first}", fix="mend the tokenizer files"
        ) from error


def calibration_sources(plan: Plan, model: str) -> tuple[str, ...]:
    """What to calibrate on: what was asked for, else the embedded text for the embedded model and c4 for all others."""
    return plan.recipe.calibration.sources or (("embedded",) if model == EMBEDDED else ("c4",))


def load_inputs(plan: Plan, model: str, trust_remote_code: bool, voice: Voice) -> Inputs:
    """Tokenize calibration and evaluation text.

    Raises:
        UserError: see :mod:`compressor.calibration`.
    """
    recipe = plan.recipe
    sources = calibration_sources(plan, model)
    texts = recipe.evaluation.texts or default_texts(sources)
    if texts == ("none",) and not recipe.needs_data:
        return Inputs(None, None, None)
    folder = plan.skeleton.checkpoint.folder
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    calibration = longer = None
    if recipe.needs_data:
        settings, sampler = recipe.calibration, _sampler(plan, tokenizer, trust_remote_code)
        calibration = load_calibration(
            sources,
            tokenizer,
            nsamples=settings.nsamples,
            seqlen=plan.seqlen,
            seed=settings.seed,
            sampler=sampler,
        )
        _check_ids(calibration.ids, plan)
        if plan.longer is not None:
            longer = load_longer(plan.longer, sources, tokenizer, settings.seed, sampler)
            _check_ids(longer.ids, plan)
        voice.detail("first calibration window: " + "|".join(calibration.preview[:64]).replace("\n", "\\n"))
    loaded = None
    if texts != ("none",):
        windows = recipe.evaluation.windows
        loaded = load_texts(texts, tokenizer, seqlen=plan.eval_seqlen, windows=windows, words=RUN_WORDS)
        _check_ids(loaded.ids, plan)
    return Inputs(tokenizer, calibration, loaded, longer)


def _check_ids(ids: Tensor, plan: Plan) -> None:
    vocabulary = plan.skeleton.config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer gives id {int(ids.max())}, the model's vocabulary ends at {vocabulary - 1}",
            fix="tokenizer and model do not belong together",
        )


def _sampler(plan: Plan, tokenizer: Any, trust_remote_code: bool) -> Any:
    """Sampling from the model itself, for ``--calibration self``: loads the whole model."""

    def sample(nsamples: int, seqlen: int, seed: int) -> Tensor:
        from compressor.calibration import sample_from_model

        folder, trust = plan.skeleton.checkpoint.folder, trust_remote_code
        with using("packed"):  # the same text on every machine
            model = load_whole(folder, dtype=plan.dtype, device=plan.device, trust_remote_code=trust)
        return sample_from_model(model, tokenizer, nsamples, seqlen, seed)

    return sample


def probe_ids(inputs: Inputs, config: Any) -> Tensor:
    """One short window (1, <= 64) whose logits the finished folder must reproduce."""
    if inputs.texts is not None:
        return inputs.texts.ids[:1, :PROBE_TOKENS].clone()
    if inputs.calibration is not None:
        return inputs.calibration.ids[:1, :PROBE_TOKENS].clone()
    length = min(PROBE_TOKENS, context_length(config) or PROBE_TOKENS)
    return (torch.arange(length)[None] * 7919) % int(config.get_text_config().vocab_size)
