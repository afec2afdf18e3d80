"""The third stage of training: fewer, longer windows of the same text.

A memory that was only ever trained on windows of ``--seqlen`` tokens has never had to keep anything for longer. The
stage goes on with the same model, loss and optimizer, at a tenth of the rates: it is to lengthen what has been learnt,
not to learn anew (HALO, arXiv 2601.22156, ends its second stage and keeps its third at a tenth of the peak)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.calibration import TokenWindows, load_calibration
from compressor.engine.processes import world_size
from compressor.errors import UserError
from compressor.methods.linearize_settings import LinearizeSettings

LONG_SEQLEN = 16384
"""Tokens in a window where nothing else is asked for (HALO's)."""


@dataclass(frozen=True)
class Longer:
    """What the third stage trains on.

    Attributes:
        tokens: to train on, in all.
        seqlen: tokens in a window.
        windows: how many there are to draw from: about as many tokens as the calibration has.
        batch: windows in a step, so that a step has about as many tokens as those before it.
    """

    tokens: int
    seqlen: int
    windows: int
    batch: int


def foresee_longer(settings: LinearizeSettings, seqlen: int, nsamples: int, context: int | None) -> Longer | None:
    """The third stage of a run; None where there is none.

    A budget that comes with one does without where the model's context leaves no room for longer windows.

    Args:
        seqlen, nsamples: of the calibration.
        context: longest context of the model; None where it names none.
    """
    length = settings.long_seqlen or min(LONG_SEQLEN, context or LONG_SEQLEN)
    if not settings.longer or (settings.long_tokens is None and length <= seqlen):
        return None
    batch = max(1, round(settings.batch * seqlen / length))
    return Longer(settings.longer, length, max(batch, nsamples * seqlen // length), batch)


def longer_violations(
    settings: LinearizeSettings, longer: Longer | None, seqlen: int, context: int | None, name: str
) -> list[str]:
    """What stands against the third stage, with what would mend it.

    Args:
        name: of the model.
    """
    if longer is None:
        unused = settings.long_seqlen is not None and not settings.longer
        return ["--long-seqlen is of the third stage, which has no tokens: --long-tokens N"] if unused else []
    found = []
    if settings.trained == "none":
        found.append("--long-tokens trains end to end, and --train none forbids that; --train auto")
    if context is not None and longer.seqlen > context:
        found.append(
            f"windows of {longer.seqlen} tokens do not fit the context of {name}, {context}; --long-seqlen {context}"
        )
    elif longer.seqlen <= seqlen:
        most = min(4 * seqlen, context or 4 * seqlen)
        found.append(
            f"the third stage has windows of {longer.seqlen} tokens, no longer than those before it ({seqlen}); "
            + (f"--long-seqlen {most}" if most > seqlen else "a smaller --seqlen")
        )
    if longer.batch % (world := world_size()):
        found.append(
            f"steps of {longer.batch} windows of {longer.seqlen} tokens cannot be shared by {world} processes; "
            f"--batch {world * max(1, round(longer.seqlen / seqlen))}"
        )
    return found


def load_longer(longer: Longer, sources: Sequence[str], tokenizer: Any, seed: int, sampler: Any) -> TokenWindows:
    """Draw the windows of the third stage from the sources of the calibration, by the rules of each.

    Raises:
        UserError: too little text, or none that is long enough; see :mod:`compressor.calibration`.
    """
    try:
        return load_calibration(
            sources, tokenizer, nsamples=longer.windows, seqlen=longer.seqlen, seed=seed, sampler=sampler
        )
    except UserError as error:
        said = str(error).rpartition("; ")[0] or str(error)  # its own remedies are those of --seqlen
        raise UserError(
            f"third stage, windows of {longer.seqlen} tokens: {said}",
            fix="lower --long-seqlen, or give longer texts to --calibration",
        ) from error


def joined_texts(windows: TokenWindows) -> list[str]:
    """Warnings for sources whose texts are so short that a long window holds several: nothing reaches across.

    Worse, a dense model that knows single texts predicts the second of two badly, and would be learnt from there.
    """
    length = windows.ids.shape[1]
    found = []
    for source in windows.sources:
        if source.get("sampling") == "concatenate" and source["documents"] * length > source["tokens"]:
            mean = source["tokens"] // source["documents"]
            found.append(
                f"third stage: texts of {source['name']} have about {mean:,} tokens, so that windows of {length:,} "
                "hold several, where there is little to remember and the dense model may be no good teacher: give "
                "longer texts, or :sampling=random-crop, which takes only those that are long enough"
            )
    return found
