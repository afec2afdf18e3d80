"""Packed representations of a matrix. One file each: pack, unpack, and the layout on paper."""

from __future__ import annotations

from compressor.formats.parts import Layout, Spec
from compressor.formats.registry import FORMATS, Format, format_of, nbytes, tensor_name
from compressor.formats.representation import Dense, Masked, Representation, SparseInt, choose, pack, unpack

__all__ = [
    "FORMATS",
    "Dense",
    "Format",
    "Layout",
    "Masked",
    "Representation",
    "SparseInt",
    "Spec",
    "choose",
    "format_of",
    "nbytes",
    "pack",
    "tensor_name",
    "unpack",
]
