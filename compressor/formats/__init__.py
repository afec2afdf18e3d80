"""Packed representations of a matrix. One file each: pack, unpack, and the layout on paper."""

from __future__ import annotations

from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt
from compressor.formats.low_rank import LowRank
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.parts import Layout, Spec
from compressor.formats.registry import FORMATS, Format, format_of, nbytes, tensor_name
from compressor.formats.representation import Masked, Representation, SparseInt, choose, pack, unpack
from compressor.formats.scaled_binary import ScaledBinary
from compressor.formats.sum import Sum
from compressor.formats.trit_planes import TritPlanes

__all__ = [
    "FORMATS",
    "Dense",
    "Format",
    "GroupInt",
    "Layout",
    "LowRank",
    "Masked",
    "PartialBinary",
    "Representation",
    "ScaledBinary",
    "SparseInt",
    "Spec",
    "Sum",
    "TritPlanes",
    "choose",
    "format_of",
    "nbytes",
    "pack",
    "tensor_name",
    "unpack",
]
