"""What is taken apart as one matrix: a single one, or several with the same input, stacked on each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.engine.skeleton import Linear
from compressor.methods.ranks import Rank

JOINED = "+"
"""Between the names of the members of a stack, in its own name."""


@dataclass(frozen=True)
class Unit:
    """One matrix, or several whose outputs are stacked."""

    members: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """The names of all members."""
        return JOINED.join(linear.name for linear in self.members)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs of all, inputs)."""
        return sum(linear.shape[0] for linear in self.members), self.members[0].shape[1]

    @property
    def block(self) -> int:
        """Where its members are."""
        return self.members[0].block

    def split(self, stacked: Tensor) -> list[Tensor]:
        """The rows of each member."""
        return list(torch.split(stacked, [linear.shape[0] for linear in self.members]))


def stacks(linears: Sequence[Linear], inputs: Mapping[str, int]) -> list[Unit]:
    """Stacks of linears of one block with the same input; experts, of which few may be called, are left alone.

    Args:
        inputs: linear name -> a number that is the same for those with the same input.
    """
    groups: dict[int, list[Linear]] = {}
    for linear in linears:
        if linear.name in inputs and ".experts." not in linear.name:
            groups.setdefault(inputs[linear.name], []).append(linear)
    return [Unit(tuple(members)) for members in groups.values() if len(members) > 1]


def unit_of(linear: Linear, ranks: Mapping[str, Rank]) -> str:
    """The name under which ``ranks`` has a linear: its own, or that of its stack."""
    if linear.name in ranks:
        return linear.name
    return next(name for name in ranks if linear.name in name.split(JOINED))


def units_in(ranks: Mapping[str, Rank], linears: Iterable[Linear]) -> list[Unit]:
    """The units that ``ranks`` are of, in the order of their first members."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(unit_of(linear, ranks), []).append(linear)
    return [Unit(tuple(members)) for members in found.values()]
