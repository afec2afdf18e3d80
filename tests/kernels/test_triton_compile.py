"""The GPU kernels compile for GPUs that are not there; and the assembly that the interpreter does not know is right."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed (pip install triton)"
)


def kernels_for(capability: int, cache: Path) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, HERE / "compile_for_gpu.py", str(capability)],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_become_what_they_should(capability: int, tmp_path: Path) -> None:
    found = kernels_for(capability, tmp_path)
    assert len(found) == 20
    for name, kernel in found.items():
        counts = kernel["instructions"]
        assert kernel["stack"] <= 16, f"{name} spills registers"  # Triton 3.6 keeps two numbers of one there
        if "gemv" in name or "fused" in name or "signs 1 int8" in name:
            assert counts["IDP"] >= 64, f"{name} has no products of four bytes"
        elif "int8" in name:
            assert counts["IMMA"] + counts["IGMMA"] >= 8, f"{name} has no int8 tensor core instructions"
            assert counts["PRMT"] <= 8, f"{name} takes bytes apart one by one"
        elif "gemm" in name:
            assert counts["HMMA"] + counts["HGMMA"] >= 8, f"{name} has no tensor core instructions"


def run_ptx(assembly: str, word: int, outputs: int) -> list[int]:
    """The few instructions that the kernels write out, one word at a time."""
    registers = {f"${outputs}": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(number: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([number & 0xFFFF, number >> 16]).to(torch.uint16).view(dtype).float()

    for line in re.sub(r"[{}]", "", assembly).split(";"):
        kind, _, rest = line.strip().partition(" ")
        to, *sources = [name.strip() for name in rest.split(",")]
        if kind in ("", ".reg"):
            continue
        a, *more = [value(name) for name in sources]
        if kind == "mov.b32":
            result = a
        elif kind == "and.b32":
            result = a & more[0]
        elif kind == "shr.u32":
            result = a >> more[0]
        elif kind == "prmt.b32":
            eight = a | more[0] << 32
            result = sum((eight >> 8 * (more[1] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
        else:
            dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[kind]
            both = (halves(a, dtype) * halves(more[0], dtype) + halves(more[1], dtype)).to(dtype).view(torch.uint16)
            result = int(both[0]) | int(both[1]) << 16
        registers[to] = result
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("bits", [2, 4])
def test_assembly_of_fields(bits: int) -> None:
    from compressor.kernels.triton.device.common import field_assembly, float_assembly

    word = 0xE4D1A3B7
    for field in range(8 // bits):
        codes = [word >> (8 * byte + bits * field) & (2**bits - 1) for byte in range(4)]
        [packed] = run_ptx(field_assembly(bits, field), word, 1)
        assert list(packed.to_bytes(4, "little")) == codes
        for offset in (0, 1, 2, 4, 8):
            for half, dtype in ((True, torch.float16), (False, torch.bfloat16)):
                found = run_ptx(float_assembly(bits, field, offset, half), word, 2)
                raw = torch.tensor([part >> shift & 0xFFFF for part in found for shift in (0, 16)])
                assert raw.to(torch.uint16).view(dtype).tolist() == [code - offset for code in codes]
