"""The weights around a narrowed input: in the narrow shapes that are stored, and in the old ones, computing the same.

The old shapes let a model go on with its own modules while it is being compressed. Of an MLP, neurons that are gone
have zeros on both sides; of attention, values are P P^T V, and the output projection is O' P^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.threads import matmul


def expand_columns(narrow: Tensor, kept: Tensor, inputs: int) -> Tensor:
    """Return (m, inputs): the columns of ``narrow`` (m, k) in the places ``kept`` (k,), zeros elsewhere."""
    return narrow.new_zeros(len(narrow), inputs).index_copy_(1, kept, narrow)


def expand_rows(narrow: Tensor, kept: Tensor, outputs: int) -> Tensor:
    """Return (outputs, ...): the rows of ``narrow`` (k, ...) in the places ``kept`` (k,), zeros elsewhere."""
    return narrow.new_zeros(outputs, *narrow.shape[1:]).index_copy_(0, kept, narrow)


def project_columns(weight: Tensor, bases: Tensor) -> Tensor:
    """Return W B (m, heads d') of ``weight`` (m, heads d), every head in the basis of its values, ``bases`` (g, d, d').

    Consecutive heads share values: head h has basis ``h // (heads / g)``.
    """
    m, groups, dim = len(weight), *bases.shape[:2]
    shared = weight.reshape(m, groups, -1, dim)
    return torch.cat([matmul(shared[:, g].reshape(-1, dim), bases[g]).reshape(m, -1) for g in range(groups)], dim=1)


def expand_output(narrow: Tensor, bases: Tensor) -> Tensor:
    """Return O' B^T (m, heads d) of the narrow output projection (m, heads d')."""
    return project_columns(narrow, bases.transpose(1, 2))


def narrow_values_of(weight: Tensor, bases: Tensor) -> Tensor:
    """Return P^T V (g d', ...) in fp32 of a value projection (g d, n), or of its bias (g d,)."""
    groups, dim, _ = bases.shape
    rows = weight.float().reshape(groups, dim, -1)
    narrow = torch.cat([matmul(P.T, V) for P, V in zip(bases, rows, strict=True)])
    return narrow.reshape(-1, *weight.shape[1:])


def expand_values(narrow: Tensor, bases: Tensor) -> Tensor:
    """Return P V' (g d, ...) of a narrow value projection (g d', n), or of its bias (g d',)."""
    return narrow_values_of(narrow, bases.transpose(1, 2))
