"""Packed representations of a matrix. One file each: pack, unpack, and the layout on paper."""

from __future__ import annotations

from compressor.formats.group_int import GroupInt
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.parts import Layout, Spec
from compressor.formats.registry import FORMATS, Format, format_of, nbytes, tensor_name
from compressor.formats.representation import Dense, Masked, Representation, SparseInt, choose, pack, unpack
from compressor.formats.trit_planes import TritPlanes

__all__ = [
    "FORMATS",
    "Dense",
    "Format",
    "GroupInt",
    "Layout",
    "Masked",
    "PartialBinary",
    "Representation",
    "SparseInt",
    "Spec",
    "TritPlanes",
    "choose",
    "format_of",
    "nbytes",
    "pack",
    "tensor_name",
    "unpack",
]
