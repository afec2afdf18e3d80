"""One run of llm-compressor's SparseGPT, as a user of it would write it. Runs in its own virtual environment.

``python llmcompressor_job.py MODEL IDS.npy OUT --sparsity 0.5``. Only the projections of the decoder blocks are named:
with ``targets=["Linear"], ignore=["lm_head"]`` it also prunes an embedding that is tied to the head.
"""

from __future__ import annotations

import argparse

PROJECTIONS = r"re:.*\.(q|k|v|o|gate|up|down)_proj$"


def main() -> None:
    """Load, calibrate on the given windows, prune, save a dense checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids", help="token windows (windows, length), .npy")
    parser.add_argument("out")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", help="to compute in; 'auto': the checkpoint's own")
    args = parser.parse_args()

    import numpy as np
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = np.load(args.ids)
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype),
        processor=AutoTokenizer.from_pretrained(args.model),
        dataset=Dataset.from_dict(rows),
        recipe=SparseGPTModifier(sparsity=args.sparsity, mask_structure="0:0", targets=[PROJECTIONS]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        output_dir=args.out,
        save_compressed=False,
    )


if __name__ == "__main__":
    main()
