"""One run of llm-compressor, as a user of it would write it. Runs in its own virtual environment.

``python llmcompressor_job.py MODEL IDS.npy OUT --method sparsegpt --sparsity 0.5``, or ``--method gptq --group 128``,
or ``awq`` (4 bits, symmetric). Only the projections of the decoder blocks are named: with ``targets=["Linear"],
ignore=["lm_head"]`` it also prunes an embedding that is tied to the head.
"""

from __future__ import annotations

import argparse
from typing import Any

PROJECTIONS = r"re:.*\.(q|k|v|o|gate|up|down)_proj$"


def recipe(args: argparse.Namespace) -> Any:
    """What llm-compressor is to do."""
    if args.method == "sparsegpt":
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier  # type: ignore[import-not-found]

        return SparseGPTModifier(sparsity=args.sparsity, mask_structure="0:0", targets=[PROJECTIONS])
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "channel"} if args.group == "row" else {"strategy": "group", "group_size": int(args.group)}
    groups = {"group_0": {"targets": [PROJECTIONS], "weights": weights}}
    if args.method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

        return GPTQModifier(config_groups=groups)
    from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]

    _do_not_pin()
    return [AWQModifier(), QuantizationModifier(config_groups=groups)]


def _do_not_pin() -> None:
    """Let its AWQ run without an accelerator: it stops there at pinning memory, which is for accelerators only."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache  # type: ignore[import-not-found]

    if not torch.cuda.is_available() and hasattr(IntermediatesCache, "pin_memory"):
        IntermediatesCache.pin_memory = lambda *_, **__: None


def main() -> None:
    """Load, calibrate on the given windows, compress, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids", help="token windows (windows, length), .npy")
    parser.add_argument("out")
    parser.add_argument("--method", choices=("sparsegpt", "gptq", "awq"), default="sparsegpt")
    parser.add_argument("--group", default="128", help="inputs that share a scale, or row")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", help="to compute in; 'auto': the checkpoint's own")
    args = parser.parse_args()

    import numpy as np
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = np.load(args.ids)
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype),
        processor=AutoTokenizer.from_pretrained(args.model),
        dataset=Dataset.from_dict(rows),
        recipe=recipe(args),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        output_dir=args.out,
        save_compressed=args.method != "sparsegpt",  # packed integers; what is pruned stays dense
    )


if __name__ == "__main__":
    main()
