"""All formats by name, and what can be said about a packed matrix from its spec alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from compressor.formats.bitmask import layout_bitmask, pack_bitmask, unpack_bitmask
from compressor.formats.dense import layout_dense, pack_dense, unpack_dense
from compressor.formats.nm import layout_nm, pack_nm, unpack_nm
from compressor.formats.parts import Layout, Spec
from compressor.formats.sparse_int import layout_sparse_int, pack_sparse_int, unpack_sparse_int


@dataclass(frozen=True)
class Format:
    """A packed representation of a matrix.

    Args:
        pack: tensors -> parts; takes what the format is made of (see each file).
        unpack: (parts, spec) -> matrix (m, n) in the spec's dtype, bit-exact.
        layout: spec -> part name -> (shape, dtype).
    """

    pack: Callable[..., dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Spec], Tensor]
    layout: Callable[[Spec], Layout]


FORMATS: dict[str, Format] = {
    "dense": Format(pack_dense, unpack_dense, layout_dense),
    "bitmask": Format(pack_bitmask, unpack_bitmask, layout_bitmask),
    "nm": Format(pack_nm, unpack_nm, layout_nm),
    "sparse-int": Format(pack_sparse_int, unpack_sparse_int, layout_sparse_int),
}


def format_of(spec: Spec) -> Format:
    """Return the format a spec names; ValueError when this version does not know it."""
    if spec.get("format") not in FORMATS:
        raise ValueError(f"unknown format {spec.get('format')!r} (known: {', '.join(FORMATS)}); a newer file?")
    return FORMATS[spec["format"]]


def nbytes(spec: Spec) -> int:
    """Return the bytes of all packed tensors of a matrix."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in format_of(spec).layout(spec).values())


def tensor_name(module: str, part: str) -> str:
    """Return the name of a part on disk and in memory: ``a.b.weight_<part>``, a dense matrix just ``a.b.weight``."""
    return f"{module}.weight" if part == "weight" else f"{module}.weight_{part}"
