"""Products with packed matrices on a GPU, by kernels written in Triton. Triton is imported when one is first needed.

`supports` says why a matrix cannot be used here, `prepare` turns its parts into a layout on the device, `apply`
multiplies. What a layout needs in memory is its ``nbytes``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.formats.parts import Spec
from compressor.kernels.triton.layouts import Planes, make_planes, planes_reason
from compressor.kernels.triton.sparse_signs import SparseSigns, make_signs, signs_reason

Layout = Planes | SparseSigns

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)


def supports(spec: Spec, device: torch.device | str) -> str | None:
    """Return why the kernels cannot be used for a matrix on a device, or None where they can.

    Args:
        spec: of the matrix.
        device: where it would be.

    Returns:
        A reason to show to a user; the matrix is then unpacked as without these kernels.
    """
    if (reason := _device_reason(torch.device(device))) is not None:
        return reason
    if spec["format"] in ("trit-planes", "group-int"):
        return planes_reason(spec)
    if spec["format"] == "partial-binary":
        return signs_reason(spec)
    return f"there is no kernel for the format {spec['format']}"


def prepare(parts: Mapping[str, Tensor], spec: Spec, device: torch.device | str) -> Layout:
    """Return the layout of a matrix on ``device``, made a few rows at a time.

    Raises:
        ValueError: a part does not fit the spec, or the format or its groups are not supported.
    """
    if spec["format"] == "partial-binary":
        return make_signs(parts, spec, device)
    if spec["format"] in ("trit-planes", "group-int"):
        return make_planes(parts, spec, device)
    raise ValueError(f"there is no kernel for the format {spec['format']}")


def apply(layout: Layout, x: Tensor, bias: Tensor | None = None, exact: bool = False) -> Tensor:
    """Return x W^T + bias.

    Args:
        layout: of W (m, n), on the device of x.
        x: (..., n) fp32, fp16 or bf16.
        bias: (m,) or None.
        exact: leave activations as they are. Otherwise, up to 64 tokens (4 for ``partial-binary``), they are rounded to
            int8 with a scale for every token and 128 inputs.

    Returns:
        (..., m) in the dtype of x. NaN and infinite activations make the outputs of their token not finite, and of no
        other.

    Raises:
        ValueError: x is of another dtype, width or device.
    """
    from compressor.kernels.triton import ops

    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activations are {x.dtype}: expected fp32, fp16 or bf16")
    if x.shape[-1] != layout.n or x.device != layout.words.device:
        raise ValueError(f"activations {list(x.shape)} on {x.device} for {layout.n} inputs on {layout.words.device}")
    return ops.linear(x, bias, layout, exact=exact)


def _device_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes"):
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the device {device} is not a CUDA GPU"
    if not torch.cuda.is_available():
        return "CUDA is not available"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return None
