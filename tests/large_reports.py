"""Reports of models that are too large to be compressed in a test: made from the schema, for pages to be looked at."""

from __future__ import annotations

import random

from compressor.report.schema import Layer, LedgerRow, Report

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def large(report: Report, blocks: int = 32, experts: int = 0) -> Report:
    """``report`` with the layers of a large model: sizes as of 8 billion parameters, errors that grow with depth.

    Args:
        experts: instead of each matrix of the feed-forward part, so many smaller ones.
    """
    chance = random.Random(0)
    layers = []
    for block in range(blocks):
        for kind, (rows, columns) in SHAPES.items():
            part, name = kind.split(".")
            many = experts and part == "mlp"
            for expert in range(experts if many else 1):
                bits = 3.25 if name in ("gate_proj", "up_proj") else 8.25 if name == "v_proj" else 4.25
                shape = (rows // 8 if many else rows, columns // 8 if many else columns)
                layers.append(
                    Layer(
                        name=f"model.layers.{block}.{part}{f'.experts.{expert}' if many else ''}.{name}",
                        block=block,
                        kind=f"{part}{'.experts.*' if many else ''}.{name}",
                        shape=shape,
                        method="gptq",
                        format="group-int",
                        sparsity=0.3 + 0.4 * block / blocks * (name == "down_proj"),
                        bits_per_weight=bits,
                        bytes=int(bits * shape[0] * shape[1] / 8),
                        relative_error=10 ** (chance.gauss(-2.6, 0.2) + block / blocks),
                        tokens=131072,
                    )
                )
    linears = sum(layer.bytes for layer in layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    outer = 2 * 128256 * 4096
    sizes = {"embeddings": (outer, 2 * outer), "norms and others": (266_240, 532_480)}
    ledger = [
        LedgerRow(
            group="compressed linears",
            format="group-int",
            tensors=len(layers),
            parameters=weights,
            bytes=linears,
            source_bytes=2 * weights,
            bits_per_weight=8 * linears / weights,
            share=0.6,
        ),
        *(
            LedgerRow(group=group, format="bfloat16", parameters=n, bytes=size, source_bytes=size, share=0.2)
            for group, (n, size) in sizes.items()
        ),
        LedgerRow(group="container", format="headers", bytes=90_000, source_bytes=30_000, share=0.0),
        LedgerRow(
            group="config, tokenizer, reader", format="files", bytes=9_100_000, source_bytes=9_000_000, share=0.0
        ),
    ]
    total = sum(row.bytes for row in ledger)
    size = report.size.model_copy(
        update={"ledger": ledger, "output_bytes": total, "source_bytes": 2 * weights + 2 * outer}
    )
    return report.model_copy(update={"layers": layers, "size": size})
