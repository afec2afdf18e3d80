"""Whether an evaluation text was seen in calibration: a score on it would flatter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compressor.calibration.evaluation import EvaluationText
from compressor.calibration.load import TokenWindows

GRAM = 16
LIMIT = 0.2
"""Share of the evaluation text's 16-grams found in the calibration windows above which the texts count as the same."""

_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SameText:
    """Outcome of ``same_text``; true in a condition when the texts are the same.

    Attributes:
        same: identical source, or more than ``LIMIT`` of the 16-grams shared.
        why: ``"identical source"``, ``"overlapping text"`` or ``""``.
        shared: share of the evaluation text's 16-grams that occur in the calibration windows, 0 to 1.
        source: name of the calibration source that is identical, if one is.
    """

    same: bool
    why: str
    shared: float
    source: str | None = None

    def __bool__(self) -> bool:
        return self.same


def same_text(calibration: TokenWindows, evaluation: EvaluationText) -> SameText:
    """Compare the text that was calibrated on with the one that is evaluated on."""
    shared = shared_grams(calibration.ids, evaluation.ids)
    for source in calibration.sources:
        hashes = {source.get("file_sha256"), source.get("text_sha256")} - {None}
        if source["identity"] == evaluation.identity or hashes & {evaluation.file_sha256, evaluation.text_sha256}:
            return SameText(True, "identical source", shared, str(source["name"]))
    if shared > LIMIT:
        return SameText(True, "overlapping text", shared)
    return SameText(False, "", shared)


def shared_grams(seen: Tensor, asked: Tensor) -> float:
    """Return the share of the 16-grams of ``asked`` (W, L) that occur in ``seen`` (N, L'), within windows."""
    ours, theirs = _hashes(seen), _hashes(asked)
    return float(np.isin(theirs, ours).mean()) if len(theirs) and len(ours) else 0.0


def _hashes(ids: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return a 64-bit polynomial hash (mod 2^64, odd base, mixed) of every 16-gram of ``ids`` (N, L), flat."""
    tokens = ids.numpy().astype(np.uint64) + np.uint64(1)
    positions = max(0, tokens.shape[1] - GRAM + 1)
    value = np.zeros((tokens.shape[0], positions), dtype=np.uint64)
    for offset in range(GRAM):
        value = (value ^ (value >> np.uint64(29))) * _BASE + tokens[:, offset : offset + positions]
    return value.reshape(-1)
