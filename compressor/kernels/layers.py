"""What a packed layer calls instead of unpacking its matrix: one of the rungs, for one layer or several that share
their input."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.errors import UserError
from compressor.formats.parts import Spec
from compressor.formats.registry import format_of
from compressor.kernels.matrix import DTYPES, Kind, Matrix, multiplies_bf16, room
from compressor.kernels.native import LEVELS
from compressor.kernels.products import Product, Unsupported, make_product
from compressor.kernels.rebuild import large_part, rebuilt
from compressor.kernels.stock import Dense, Int4Pack, Int8Chunks, make_stock
from compressor.kernels.triton import Layout

ACTIVATIONS = "COMPRESSOR_ACTIVATIONS"
"""Environment variable: ``int8`` (the default) or ``exact``."""


def exact_activations() -> bool:
    """Whether activations are to stay as they are.

    Raises:
        UserError: the variable says something else.
    """
    value = os.environ.get(ACTIVATIONS, "int8").strip().lower() or "int8"
    if value not in ("int8", "exact"):
        raise UserError(f"{ACTIVATIONS}={value}: expected int8 or exact", fix=f"unset {ACTIVATIONS}")
    return value == "exact"


@dataclass(eq=False)
class Fast:
    """The product of one layer.

    Attributes:
        rung: how it multiplies, one of `native.RUNGS`, or ``triton``.
        reason: why it is not the rung that was asked for; empty if it is.
        product: of the matrix, in the layout of that rung.
        exact: see `Matrix.product`.
        group: layers with the same input that are multiplied together, and this one's place among them; or None.
        device: kind of device that it is on.
    """

    rung: str
    reason: str
    product: Product | Dense | Int4Pack | Int8Chunks | OnGpu
    exact: bool
    group: tuple[Group, int] | None = None
    device: str = "cpu"

    def large_part(self, spec: Spec) -> str | None:
        """Return the name of the stored part that this can make again, if any."""
        return large_part(spec, self.product)

    def rebuilt(self, spec: Spec) -> dict[str, Tensor]:
        """Return that part, by its name, bit for bit as it was stored."""
        assert isinstance(self.product, Matrix)
        found: dict[str, Tensor] = rebuilt(self.product, spec)
        return found

    def fits(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether this can stand in for a layer: activations are where it is, and nobody wants gradients."""
        if x.device.type != self.device or x.dtype not in DTYPES:
            return False
        return not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (..., n) to (..., m)."""
        graph = torch.compiler.is_compiling()
        if self.group is not None and not graph:
            y = self.group[0].take(self.group[1], x)
            return y if bias is None else y + bias.to(y.dtype)
        wide = None if bias is None else bias.float()
        if isinstance(self.product, Matrix) and not graph:
            return self.product.eager_product(x, wide, self.rung, self.exact)
        y = self.product.product(x.reshape(-1, x.shape[-1]), wide, self.rung, self.exact)
        return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True, eq=False)
class OnGpu:
    """A matrix in the layout of the Triton kernels."""

    layout: Layout

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x W^T + bias``; see `Matrix.product`."""
        from compressor.kernels.triton import apply

        return apply(self.layout, x, bias, exact)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.layout.nbytes


@dataclass(eq=False)
class Group:
    """Matrices in one piece of memory, one below the other, that are multiplied with an input when the first is asked.

    The others' results wait until they are asked for the same tensor; another tensor, or one that was changed in
    between, is multiplied anew.
    """

    whole: Matrix
    sizes: list[int]
    rung: str
    exact: bool
    _held: tuple[Tensor, int | None, tuple[Tensor, ...]] | None = None

    def take(self, place: int, x: Tensor) -> Tensor:
        """Return the product (..., m) of the matrix in ``place`` with ``x`` (..., n)."""
        version, held = None if x.is_inference() else x._version, self._held
        if held is None or held[0] is not x or held[1] != version:
            products = torch.split(self.whole.eager_product(x, None, self.rung, self.exact), self.sizes, dim=-1)
            held = (x, version, products)  # in one piece: another thread may be using the model
        self._held = None if place + 1 == len(self.sizes) else held
        return held[2][place]


def make_fast(parts: Mapping[str, Tensor], spec: Spec, rung: str, dtype: torch.dtype) -> Fast | None:
    """Prepare a packed matrix for a rung, or for the next lower one that can do it.

    Args:
        parts, spec: what was stored.
        rung: see `native.rung`.
        dtype: of the activations.

    Returns:
        None where the rung is ``packed``, or there are no kernels for the matrix's device: the layer unpacks its matrix
        for every use.
    """
    if rung == "packed" or dtype not in DTYPES:
        return None
    exact, device = exact_activations(), next(iter(parts.values())).device
    if rung == "dense":
        return _dense(parts, spec, dtype, "", exact)
    if device.type != "cpu":
        return _on_gpu(parts, spec, device, exact)
    reason = ""
    if rung in LEVELS:
        try:
            product = make_product(parts, spec, rung)
            single = isinstance(product, Matrix) and product.kind in (Kind.PARTIAL, Kind.SPARSE8)
            if not exact or not single or multiplies_bf16(rung):
                return Fast(rung, "", product, exact)
            reason = "single integers with exact activations, without products of bf16"
        except Unsupported as why:
            reason = str(why)
    if not exact and (stock := make_stock(parts, spec, dtype)) is not None:
        return Fast("torch", reason, stock, exact)
    return _dense(parts, spec, dtype, reason, exact)


def _dense(parts: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype, reason: str, exact: bool) -> Fast:
    weight = format_of(spec).unpack(parts, spec).to(dtype)
    return Fast("dense", reason, Dense(weight), exact, device=weight.device.type)


def _on_gpu(parts: Mapping[str, Tensor], spec: Spec, device: torch.device, exact: bool) -> Fast | None:
    from compressor.kernels import triton

    if triton.supports(spec, device) is not None:
        return None
    return Fast("triton", "", OnGpu(triton.prepare(parts, spec, device)), exact, device=device.type)


def join(layers: list[Fast]) -> bool:
    """Let layers that share their input be multiplied together, if their matrices fit below each other."""
    matrices = [layer.product for layer in layers]
    if not all(isinstance(matrix, Matrix) for matrix in matrices):
        return False
    found = [matrix for matrix in matrices if isinstance(matrix, Matrix)]
    first = found[0]
    alike = all(
        (m.kind, m.n, m.kb, m.factor) == (first.kind, first.n, first.kb, first.factor) and m.m % 16 == 0 for m in found
    )
    if not alike or first.kind > Kind.SIGN or len({layer.rung for layer in layers}) > 1:
        return False
    data = room(sum(matrix.data.numel() for matrix in found))
    torch.cat([matrix.data for matrix in found], out=data)
    extras = [matrix.extra for matrix in found if matrix.extra is not None]
    extra = torch.cat(extras) if extras else None
    whole = replace(first, m=sum(matrix.m for matrix in found), data=data, extra=extra)
    group = Group(whole, [matrix.m for matrix in found], layers[0].rung, layers[0].exact)
    at_bytes = at_tiles = 0
    for place, (layer, matrix) in enumerate(zip(layers, found, strict=True)):
        part = data[at_bytes : at_bytes + matrix.data.numel()]
        tiles = matrix.m // 16
        layer.product = replace(matrix, data=part, extra=None if extra is None else extra[at_tiles : at_tiles + tiles])
        layer.group = (group, place)
        at_bytes, at_tiles = at_bytes + matrix.data.numel(), at_tiles + tiles
    return True
