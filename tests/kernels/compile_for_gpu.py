"""Compiles the GPU kernels for a GPU that is not there, and prints for each what the assembler said. A child process.

    python compile_for_gpu.py CAPABILITY

One line of JSON a kernel: its name, registers, bytes of stack (spilled registers), and how many instructions there are
of the kinds that tell whether it became what it should.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from compressor.kernels.triton import launch, launch_signs
from compressor.kernels.triton.layouts import Planes
from compressor.kernels.triton.sparse_signs import SparseSigns

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TELLING = ("IDP", "IMMA", "IGMMA", "HMMA", "HGMMA", "LOP3", "PRMT")


class NoGpu:
    """Stands for the driver: Triton asks it for what to compile, and nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def planes_of(m: int, n: int, bits: int, planes: int, run: int, zeros: bool = False) -> Planes:
    words = torch.zeros(planes, m, n * bits // 32, dtype=torch.int32)
    scale = torch.zeros(planes, m, n // 128, dtype=torch.float16)
    return Planes(words, scale, scale.to(torch.int8) if zeros else None, 1, bits, run, 128, n, torch.bfloat16)


def signs_of(m: int, n: int) -> SparseSigns:
    words, scale = torch.zeros(m, n // 32, dtype=torch.int32), torch.zeros(m, n // 128).half()
    entries, starts = torch.zeros(m * n // 10, dtype=torch.int32), torch.zeros(m + 1, dtype=torch.int32)
    zero = torch.zeros(m, dtype=torch.uint8)
    return SparseSigns(
        words, scale, scale.float(), entries, starts, scale[:, 0], zero, 128, False, 128, n, torch.bfloat16
    )


def describe(name: str, kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return {
        "name": name,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "instructions": {kind: len(re.findall(rf"\b{kind}\b", code)) for kind in TELLING},
    }


def main() -> None:
    triton.runtime.driver.set_active(NoGpu(int(sys.argv[1])))
    run = JITFunction.run
    compiled: list[tuple[str, Any]] = []

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = only_compile
    m, n = 4096, 4096
    kinds = {"trits": planes_of(m, n, 2, 2, 32), "int4": planes_of(m, n, 4, 1, 64, zeros=True)}
    for kind, layout in kinds.items():
        launch.gemv(torch.zeros(1, n, dtype=torch.bfloat16), layout, None)
        print(json.dumps(describe(f"{kind} 1 int8 gemv_kernel", compiled[-1][1])))
        for tokens in (1, 2, 8, 16, 32, 64) if kind == "trits" else (1, 16):
            for exact in (False, True):
                done = len(compiled)
                launch.linear(torch.zeros(tokens, n, dtype=torch.bfloat16), layout, None, exact=exact)
                for name, kernel in compiled[done:]:
                    label = f"{kind} {tokens} {'exact' if exact else 'int8'} {name}"
                    if name in ("fused_kernel", "gemv_kernel", "gemm_kernel"):
                        print(json.dumps(describe(label, kernel)))
    launch.dense(kinds["trits"], torch.float16)
    for exact in (False, True):
        launch_signs.signs_linear(torch.zeros(1, n, dtype=torch.float16), signs_of(m, n), None, exact=exact)
        print(json.dumps(describe(f"signs 1 {'exact' if exact else 'int8'} signs_kernel", compiled[-1][1])))


main()
