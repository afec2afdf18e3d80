"""Evaluating a finished model, block by block, alone or against the one it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compressor.engine.checkpoint import EMBEDDED, open_checkpoint, resolve_model
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.run import measure
from compressor.run.inputs import load_tokenizer
from compressor.run.plan import choose_device, choose_dtype, choose_seqlen
from compressor.run.progress import Voice, quiet


@torch.no_grad()
def judge_model(
    model: str,
    *,
    against: str | None = None,
    texts: Sequence[str] = (),
    windows: int | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    voice: Voice | None = None,
) -> list[dict[str, Any]]:
    """Measure a model on texts. One decoder block is in memory at a time.

    Args:
        model: folder, hub id, or ``embedded``.
        against: the model it was made from, for divergence and agreement; its vocabulary must be the same.
        texts: named texts or files; by default wikitext2-test, and embedded-heldout for ``embedded``.
        windows: token windows of each text; by default as many as a named text is pinned to, else all.
        seqlen: tokens in a window; by default 2048, or the model's context where that is shorter.
        stride: tokens from one window to the next; by default ``seqlen``.
        bos: begin every window with the BOS token, which then counts as one of its ``seqlen``.
        dtype: auto (float32 on CPUs, elsewhere that of the weights), float32, bfloat16 or float16.
        device: auto, cpu, cuda, ...
        trust_remote_code: run code that the folder brings along.
        voice: how to speak; by default nothing but warnings, on standard error.

    Returns:
        For each text: ``name``, ``protocol``, ``windows``, ``tokens`` and ``rows``, one for each model: ``who`` (dense
        is ``against``, compressed ``model``), ``label``, ``perplexity``, ``bits_per_byte``, and with ``against``
        ``kl``, mean KL(base || model) in nats a token, and ``top1``, agreement from 0 to 1.

    Raises:
        UserError: unknown model, text, device or dtype; models with different vocabularies; logits not finite.
    """
    voice = voice or quiet()
    place = choose_device(device)
    runners = {}
    for who, name in (("dense", against), ("compressed", model)):
        if name is None:
            continue
        skeleton = build_skeleton(open_checkpoint(resolve_model(name)), trust_remote_code=trust_remote_code)
        precision = choose_dtype(dtype, place, skeleton.stored(next(iter(skeleton.origins)))[0])
        runners[who] = (name, BlockRunner(skeleton, device=place, dtype=precision))
    runner = runners["compressed"][1]
    vocabularies = {r.skeleton.config.get_text_config().vocab_size for _, r in runners.values()}
    if len(vocabularies) > 1:
        raise UserError(
            f"{model} and {against} have different vocabularies {sorted(vocabularies)}",
            fix="--against takes the model it was made from",
        )
    length = choose_seqlen(seqlen, runner.skeleton.config, "--seqlen")
    tokenizer = load_tokenizer(runner.skeleton.checkpoint.folder, trust_remote_code=trust_remote_code)
    chosen = tuple(texts) or ("embedded-heldout" if EMBEDDED in (model, against) else measure.HUB_DEFAULT,)
    loaded = measure.load_texts(chosen, tokenizer, seqlen=length, windows=windows, stride=stride, bos=bos)
    streams: dict[str, tuple[str, BlockRunner, Stream]] = {}
    with voice.progress(sum(len(r.skeleton.blocks) for _, r in runners.values())) as ticker:
        for who, (name, each) in runners.items():
            each.load_outer()
            stream = each.start(loaded.ids)
            for block in range(len(each.skeleton.blocks)):
                ticker.now(f"{name}: block {block + 1}")
                each.load_block(block)
                each.step(block, stream)
                each.release_block(block)
                ticker.advance()
            streams[who] = (name, each, stream)
    rows = measure.measure(streams, loaded, "dense" if against is not None else None)
    return [
        {
            "name": text.name,
            "protocol": measure.protocol(text, runner.dtype),
            "windows": len(text.ids),
            "tokens": text.ids.numel() - len(text.ids),
            "rows": measured,
        }
        for text, measured in zip(loaded.texts, rows, strict=True)
    ]
