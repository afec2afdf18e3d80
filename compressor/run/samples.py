"""How source and result go on from the beginnings of a text, asked in the process that reloads the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.kernels.native import using
from compressor.report.schema_use import Sample
from compressor.run.network import load_whole
from compressor.run.proof_models import greedy
from compressor.run.session import Run

PROMPT, TOKENS = 12, 24  # tokens of a prompt, and of what follows
LARGE = 2_000_000_000  # parameters from which on two models take minutes for a few sentences on a CPU


@dataclass(frozen=True)
class Asked:
    """Prompts, the folder of the source, and whether its code may be run; or why nothing is asked."""

    prompts: Tensor | None = None
    source: Path = Path()
    trust_remote_code: bool = False
    skipped: str | None = None

    def request(self) -> dict[str, Any]:
        """The same for the other process."""
        assert self.prompts is not None
        return {"ids": self.prompts.tolist(), "source": str(self.source), "trust": self.trust_remote_code}


def asked_of(run: Run) -> Asked:
    """The first words of some windows of the first text; nothing where none are wanted, or they would take long."""
    count, texts = run.recipe.evaluation.samples, run.inputs.texts
    if not count:
        return Asked()
    if texts is None:
        return Asked(skipped="no text was evaluated")
    if not run.recipe.verify:
        return Asked(skipped="verification was switched off, and they are written by the process that verifies")
    if run.plan.device.type == "cpu" and run.skeleton.parameters() > LARGE:
        return Asked(skipped="two models of this size take minutes for it on a CPU; compressor generate does it")
    ids = texts.ids[texts.span(0)][:count, :PROMPT].clone()
    return Asked(ids, run.skeleton.checkpoint.folder, run.options.trust_remote_code)


@torch.no_grad()
def continuations(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Let the reloaded model and its source go on; what goes wrong there says nothing against the folder.

    Returns:
        ``dense`` and ``compressed``: rows of token ids without the end of text; or ``skipped``: why there are none.
    """
    ids = torch.tensor(request["ids"])
    try:
        ours = _rows(model, ids)
        with using("packed"):  # as the result: nothing is rounded on the way
            folder, trust = Path(request["source"]), request["trust"]
            source = load_whole(folder, dtype=model.dtype, device=model.device, trust_remote_code=trust)
        return {"compressed": ours, "dense": _rows(source, ids)}
    except Exception as error:
        return {"skipped": f"{type(error).__name__}: {error}"}


def _rows(model: Any, ids: Tensor) -> list[list[int]]:
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    rows: list[list[int]] = greedy(model, ids, TOKENS, stop=True).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def samples_of(asked: Asked, said: dict[str, Any] | None, tokenizer: Any) -> tuple[list[Sample], str | None]:
    """The samples of the report, and why there are none.

    Args:
        said: as from :func:`continuations`; ``None`` where nothing was sent.
    """
    if asked.prompts is None or said is None:
        return [], asked.skipped
    if "skipped" in said:
        return [], said["skipped"]

    def words(rows: Sequence[Sequence[int]]) -> list[str]:
        return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    texts = zip(words(asked.prompts.tolist()), words(said["dense"]), words(said["compressed"]), strict=True)
    return [Sample(prompt=prompt, dense=dense, compressed=ours) for prompt, dense, ours in texts], None
