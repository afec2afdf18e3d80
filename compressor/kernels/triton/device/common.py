# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""What several kernels share: codes out of words, and products of four bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LANGUAGE_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on tensors of any device, which knows no assembly."""
    return bool(triton.knobs.runtime.interpret)


@triton.constexpr_function
def field_assembly(bits, field):
    """The instructions for field ``field`` of four bytes at once."""
    mask = {1: "0x01010101", 2: "0x03030303", 4: "0x0F0F0F0F"}[bits]
    if field == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {bits * field}; and.b32 $0, t, {mask}; }}"


@triton.constexpr_function
def float_assembly(bits, field, offset, half):
    """The instructions for field ``field`` of four bytes, minus ``offset``, as four fp16 or bf16 numbers in $0 and $1.

    A code u in the low byte of a number whose high byte is 0x64 (fp16) or 0x43 (bf16) is 1024 + u or 128 + u.
    """
    mask = {2: "0x03030303", 4: "0x0F0F0F0F"}[bits]
    high = "0x64646464" if half else "0x43434343"
    less = _twice(_minus_bits(1024 + offset, 10, 15) if half else _minus_bits(128 + offset, 7, 127))
    one, kind = ("0x3C003C00", "f16x2") if half else ("0x3F803F80", "bf16x2")
    return f"""{{ .reg .b32 t, one, less;
        shr.u32 t, $2, {bits * field}; and.b32 t, t, {mask};
        mov.b32 one, {one}; mov.b32 less, {less};
        prmt.b32 $0, t, {high}, 0x4140; prmt.b32 $1, t, {high}, 0x4342;
        fma.rn.{kind} $0, $0, one, less; fma.rn.{kind} $1, $1, one, less; }}"""


@triton.constexpr_function
def _minus_bits(value, fraction, bias):
    """The bits of the 16-bit float ``-value``, for an integer that it can hold."""
    exponent = value.bit_length() - 1
    return 0x8000 | (exponent + bias) << fraction | (value - (1 << exponent)) << fraction >> exponent


@triton.constexpr_function
def _twice(bits):
    return f"0x{bits << 16 | bits:08X}"


@triton.jit
def float_field(packed, BITS: tl.constexpr, FIELD: tl.constexpr, OFFSET: tl.constexpr, TYPE: tl.constexpr,
                ASM: tl.constexpr):  # fmt: skip
    """Codes minus ``OFFSET`` as ``TYPE``, of packed bytes as uint8."""
    if ASM and BITS < 8 and tl.float16 == TYPE:
        return tl.inline_asm_elementwise(
            float_assembly(BITS, FIELD, OFFSET, True), "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    if ASM and BITS < 8 and tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(
            float_assembly(BITS, FIELD, OFFSET, False), "=&r,=&r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return (byte_field(packed, BITS, FIELD, False).to(tl.int32) - OFFSET).to(tl.float32).to(TYPE)


@triton.jit
def word_field(words, BITS: tl.constexpr, FIELD: tl.constexpr):
    """Four codes in the bytes of each int32 word."""
    if BITS == 8:
        return words
    mask: tl.constexpr = 0x01010101 if BITS == 1 else 0x03030303 if BITS == 2 else 0x0F0F0F0F
    return (words >> (BITS * FIELD)) & mask  # the sign that an arithmetic shift drags in is masked away


@triton.jit
def byte_field(packed, BITS: tl.constexpr, FIELD: tl.constexpr, ASM: tl.constexpr):
    """Codes as int8, of packed bytes as uint8; with ``ASM`` four bytes an instruction."""
    if BITS == 8:
        return packed.to(tl.int8, bitcast=True)
    if ASM:
        return tl.inline_asm_elementwise(
            field_assembly(BITS, FIELD), "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return ((packed >> (BITS * FIELD)) & (2**BITS - 1)).to(tl.int8)


@triton.jit
def dot4(codes, x, total, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """``total`` plus the products of the four bytes of ``codes`` with the four signed bytes of ``x``, all int32."""
    if ASM:
        if SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
            )
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        code = (codes << (24 - 8 * byte)) >> 24 if SIGNED else (codes >> (8 * byte)) & 0xFF
        total += code * ((x << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def rounded(value, TYPE: tl.constexpr, ASM: tl.constexpr):
    """fp32 to ``TYPE``, to the nearest. Without ``ASM`` bf16 is rounded by hand: Triton's interpreter cuts off."""
    if tl.bfloat16 == TYPE and not ASM:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return ((bits >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value.to(TYPE)
