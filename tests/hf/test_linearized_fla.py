"""Linearized models whose memory is read by kernels of flash-linear-attention, here stand-ins of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import fla_stand_in
import pytest
import torch
from linear_models import FAMILY_OF, SPECS, linearized, some_ids
from transformers import DynamicCache

from compressor.hf import linear_attention, linear_kernels
from compressor.hf.caches import read_on
from compressor.hf.linearized import only_parts
from compressor.hf.reader import reader_source
from compressor.mixers.spec import MEMORY, WINDOW


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the kernels were called for, on a machine that looks like one that has them."""
    made: list[str] = []

    def counted(kernel: Any) -> Any:
        def call(**given: Any) -> Any:
            made.append(kernel.__name__)
            return kernel(**given)

        return call

    linear_kernels.proved_kernel.cache_clear()
    monkeypatch.delenv(linear_kernels.FLA_VARIABLE, raising=False)
    monkeypatch.setattr(linear_kernels, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(linear_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(linear_kernels, "FLA_FEWEST", 20)
    monkeypatch.setattr(linear_attention, "_coarse", lambda hidden: True)
    kernels = (fla_stand_in.chunk_gla, fla_stand_in.chunk_simple_gla)
    fla_stand_in.install(monkeypatch, **{kernel.__name__: counted(kernel) for kernel in kernels})
    yield made
    linear_kernels.proved_kernel.cache_clear()


@pytest.mark.parametrize("name", SPECS)
def test_every_method_gives_what_ours_gives(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, those of generated tokens behind a padded prompt, and gradients; one part alone too."""
    spec = SPECS[name]
    model, ids = linearized(FAMILY_OF[name], spec, dtype=torch.float32), some_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    results: list[list[torch.Tensor]] = []
    for value in ("auto", "off"):
        monkeypatch.setenv(linear_kernels.FLA_VARIABLE, value)
        calls.clear()
        cache, found = DynamicCache(), []
        with torch.no_grad():
            for start, stop in ((0, 32), (32, 33), (33, 34), (34, 60)):
                out, _ = read_on(model, cache, input_ids=ids[:, start:stop], attention_mask=mask[:, :stop])
                found.append(out.logits)
            found = [torch.cat(found, 1)[:, 7:]]  # what padding gives is nobody's
            for alone in (MEMORY, WINDOW) if spec.join in ("shared", "sum") else ():
                with only_parts(model, alone):
                    found.append(model(ids).logits)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        new = {n: p for n, p in model.named_parameters() if ".lin_" in n and p.grad is not None}
        results.append([*found, *(parameter.grad.clone() for parameter in new.values())])
        vector = spec.decay in ("lowrank", "pooled", "refined")
        kernels = {"chunk_gla" if vector else "chunk_simple_gla"} if spec.remembers and value == "auto" else set()
        assert set(calls) == kernels
    assert len(results[0]) == len(results[1])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 2e-3 * (1 + wanted.abs().max())


def test_only_models_that_compute_in_sixteen_bits_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    single = torch.zeros(1)
    assert linear_attention._coarse(single.bfloat16()) and linear_attention._coarse(single.half())
    assert not linear_attention._coarse(single) and not linear_attention._coarse(single.double())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert linear_attention._coarse(single)


def test_the_reader_file_needs_nothing_of_it() -> None:
    """transformers refuses a file of code that imports, anywhere in it, what is not installed."""
    imported = set()
    for node in ast.walk(ast.parse(reader_source())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "fla" not in imported and "read_with" in reader_source()
