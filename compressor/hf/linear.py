"""A linear layer that stays packed in memory, and unpacks its matrix for each use unless its format needs none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from compressor.formats.parts import Spec, check_parts
from compressor.formats.registry import borrowed, format_of


class UnpackedWeight(Tensor):
    """A matrix read from a packed layer. It is a copy, so assigning to its ``data`` is an error, not without effect.

    PEFT merges an adapter by ``layer.weight.data += delta``, which would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @property
    def data(self) -> Tensor:
        """The matrix as a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError("the weight of a packed layer cannot be written: call model.dequantize() first")


class PackedLinear(nn.Linear):
    """``nn.Linear`` whose weight is held as the packed parts of a format, in buffers ``weight_<part>``.

    ``weight`` reads as the unpacked matrix (out, in), a new tensor each time, so adapters can be trained beside it but
    not merged into it. The parts keep their dtypes whatever ``.to(dtype)`` asks for; that sets the dtype in which
    ``weight`` reads.
    """

    def __init__(self, spec: Spec, *, bias: bool, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Make the layer with uninitialized parts.

        Args:
            spec: of the matrix; any format but dense.
            bias: whether there is a bias (out,).
            dtype: of ``weight`` as it reads, and of the bias.
            device: where the buffers are made.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = spec["shape"]
        self.spec = dict(spec)
        self.fast: Any = None  # a product that needs no unpacked matrix, see compressor/kernels/model.py
        self.released = ""  # the buffer that is held by ``fast`` alone
        self.lender: list[PackedLinear] = []  # who holds a factor that is shared; in a list, not to be a submodule
        self.compute_dtype = dtype
        for part, (shape, part_dtype) in format_of(spec).layout(spec).items():
            self.register_buffer(f"weight_{part}", torch.empty(shape, dtype=part_dtype, device=device))
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self._is_hf_initialized = True  # transformers must not draw random numbers into a temporary weight

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed tensors by part name, those included that another layer holds."""
        return {**self._own_parts, **(borrowed(self.spec, self.lender[0].parts) if self.lender else {})}

    @property
    def _own_parts(self) -> dict[str, Tensor]:
        held = {part: getattr(self, f"weight_{part}") for part in format_of(self.spec).layout(self.spec)}
        return {**held, **self.fast.rebuilt(self.spec)} if self.released else held

    def release(self) -> None:
        """Let go of the largest part, if the fast product can make it again; `parts` and a state dict still have it."""
        if not self.released and self.fast is not None and (part := self.fast.large_part(self.spec)) is not None:
            self.released = f"weight_{part}"
            setattr(self, self.released, torch.empty(0, dtype=getattr(self, self.released).dtype))

    def restore(self) -> None:
        """Hold all parts again."""
        if self.released:
            for part, tensor in self.fast.rebuilt(self.spec).items():
                setattr(self, f"weight_{part}", tensor)
            self.released = ""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.released:
            rebuilt = self.fast.rebuilt(self.spec)
            destination.update({f"{prefix}weight_{part}": tensor for part, tensor in rebuilt.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(name.startswith(f"{prefix}weight_") for name in state_dict):  # not where only an adapter is loaded
            self.restore()
            self.fast = None  # it is of other numbers
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check(self) -> None:
        """Raise ValueError, naming the part, when the buffers are not what the spec says."""
        check_parts(self._own_parts, format_of(self.spec).layout(self.spec), self.spec["format"])

    def unpacked(self) -> Tensor:
        """Return the matrix (out, in), unpacked anew, in ``compute_dtype``."""
        with torch.no_grad():
            return format_of(self.spec).unpack(self.parts, self.spec).to(self.compute_dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix (out, in), unpacked anew for each reading."""
        return self.unpacked().as_subclass(UnpackedWeight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if (fast := self.fast) is not None and fast.fits(x, bias := self.bias):
            return fast(x, bias)  # type: ignore[no-any-return]
        if (apply := format_of(self.spec).apply) is not None:
            return apply(x, self.bias, self.parts, self.spec, self.compute_dtype)
        return F.linear(x, self.unpacked(), self.bias)

    def reset_parameters(self) -> None:
        """Do nothing: packed parts are only ever loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=next(iter(self.buffers())).device))
        if probe.device.type != "cpu":
            self.restore()
            self.fast = None
        packed = {id(buffer) for buffer in self.buffers()}

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        """Return the sizes and the format, for ``print(model)``."""
        return f"{super().extra_repr()}, format={self.spec['format']}"


def replacement(module: nn.Module, spec: Spec) -> nn.Linear:
    """Return the layer that stands for ``module`` once its weight is stored as ``spec`` says.

    Args:
        module: an ``nn.Linear``, or GPT-2's ``Conv1D`` whose weight is (in, out).
        spec: of the matrix (out, in).

    Returns:
        A :class:`PackedLinear`, or a plain ``nn.Linear`` for the format dense; on the module's device, in its dtype.

    Raises:
        ValueError: another kind of module, or another shape than the spec's.
    """
    conv1d = type(module).__name__ == "Conv1D"
    weight: Any = getattr(module, "weight", None)
    if not (conv1d or isinstance(module, nn.Linear)) or not isinstance(weight, Tensor):
        raise ValueError(f"is a {type(module).__name__}; expected a linear layer")
    shape = list(weight.shape[::-1] if conv1d else weight.shape)
    if shape != list(spec["shape"]):
        raise ValueError(f"is a {shape[0]} x {shape[1]} matrix in the model, but {spec['shape']} in the manifest")
    has_bias = getattr(module, "bias", None) is not None
    if spec["format"] == "dense":
        return nn.Linear(shape[1], shape[0], bias=has_bias, device=weight.device, dtype=weight.dtype)
    return PackedLinear(spec, bias=has_bias, dtype=weight.dtype, device=weight.device)
