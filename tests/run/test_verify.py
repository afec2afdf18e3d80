"""How far two ways to compute the same model may be apart."""

from __future__ import annotations

import torch

from compressor.run.verify import TOLERANCE, tolerance


def test_layers_that_form_no_matrix_may_differ_by_its_rounding() -> None:
    whole = {"format": "bitmask", "shape": [4, 4], "dtype": "bfloat16", "nnz": 8}
    thin = {"format": "low-rank", "shape": [4, 4], "dtype": "bfloat16"}
    wide = {**thin, "dtype": "float32"}
    assert tolerance(torch.float32, {}) == tolerance(torch.float32, {"a": whole}) == TOLERANCE[torch.float32]
    assert tolerance(torch.float32, {"a": whole, "b": thin}) == TOLERANCE[torch.bfloat16]
    assert tolerance(torch.float32, {"b": wide}) == TOLERANCE[torch.float32]
    assert tolerance(torch.bfloat16, {"b": wide}) == TOLERANCE[torch.bfloat16]
