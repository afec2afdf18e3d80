"""Token windows of a text with a model's tokenizer, for tools that should be given the very same tokens.

``python -m benchmarks.token_windows MODEL TEXT OUT.npy --nsamples 64 --seqlen 256``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Write (nsamples, seqlen) int64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args(argv)

    import numpy as np

    from compressor.calibration import load_calibration
    from compressor.run.inputs import load_tokenizer

    windows = load_calibration(
        [args.text], load_tokenizer(args.model), nsamples=args.nsamples, seqlen=args.seqlen, seed=0
    )
    np.save(args.out, windows.ids.numpy().astype(np.int64))


if __name__ == "__main__":
    main()
