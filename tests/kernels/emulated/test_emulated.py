"""The kernels for ARM, emulated: what is asked of processors of this machine is asked of that one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import arm
import pytest
import test_native_attention as attention
import test_native_calls as calls
import test_native_products as products
import test_norms as norms
import torch
from kernel_cases import CASES

from compressor.kernels.native import ABI3, Native
from compressor.kernels.norm import Formula
from compressor.kernels.sources import source_digest

kernels_only = products.kernels_only  # a fixture

OF_A_LEVEL = (
    products.test_whole_numbers_come_out_exactly,
    products.test_whole_numbers_unpacked_on_the_way,
    products.test_exact_is_exact_over_the_whole_range_of_activations,
    products.test_activations_are_rounded_to_the_same_integers,
    products.test_tiny_activations,
)
OF_ALL_OR_THE_BEST = (
    products.test_any_shape,
    products.test_more_tokens_than_are_held_at_once,
    products.test_sums_that_fill_their_registers,
    products.test_strides,
    products.test_no_tokens_and_a_token_of_zeros,
    products.test_integers_read_back_what_was_packed,
    calls.test_the_same_bytes_for_any_number_of_threads,
    calls.test_numbers_off_their_alignment_are_an_error,
    calls.test_starts_that_are_wrong_are_refused,
    calls.test_levels_that_the_processor_has_not_are_refused,
    calls.test_memory_is_read_whole,
    calls.test_nothing_is_written_beside_the_output,
)


def name_of(test: Callable[..., None]) -> str:
    return test.__name__.removeprefix("test_")


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_fp64(name: str, kernels: Native) -> None:
    products.test_products_are_those_of_fp64("neon", name, kernels)
    products.test_matrices_are_unpacked_as_stored("neon", name, kernels)
    products.test_matrices_that_are_unpacked_on_the_way("neon", name, kernels)
    products.test_every_dtype_with_bias(name, kernels)


@pytest.mark.parametrize("level", ["neon", "portable"])
@pytest.mark.parametrize("test", OF_A_LEVEL, ids=name_of)
def test_at_a_level(test: Callable[..., None], level: str, kernels: Native) -> None:
    test(level, kernels)


@pytest.mark.parametrize("dtype", products.DTYPES)
def test_what_is_not_finite_stays_in_its_token(dtype: torch.dtype, kernels: Native) -> None:
    products.test_what_is_not_finite_stays_in_its_token("neon", dtype, kernels)


@pytest.mark.parametrize("dtype", products.DTYPES)
def test_attention(dtype: torch.dtype, kernels: Native) -> None:
    for shape in attention.SHAPES:
        attention.test_against_fp64(shape, dtype, kernels)
    attention.test_infinities_and_nan(dtype, kernels)


def test_weights_of_attention(kernels: Native) -> None:
    attention.test_scores_of_any_size(kernels)


@pytest.mark.parametrize("dtype", products.DTYPES)
def test_norms(dtype: torch.dtype, kernels: Native) -> None:
    for formula in (Formula(1e-6, False, True), Formula(1e-5, True, False)):
        norms.test_against_fp64(formula, dtype, kernels)
    norms.test_what_is_not_finite_stays_in_its_row(dtype, kernels)


@pytest.mark.parametrize("test", OF_ALL_OR_THE_BEST, ids=name_of)
def test_as_on_this_machine(test: Callable[..., None], kernels: Native) -> None:
    assert kernels.levels == ("portable", "neon")
    test(kernels=kernels)


def test_a_processor_without_dot_products(use: Callable[[Native], Native], without: Native) -> None:
    """It has plain C++, and is not asked for more."""
    assert use(without).levels == ("portable",) and without.best == 0
    for name in CASES:
        products.test_every_dtype_with_bias(name, without)
    products.test_whole_numbers_come_out_exactly("portable", without)
    calls.test_levels_that_the_processor_has_not_are_refused(without)
    calls.test_memory_is_read_whole(without)


ASK = """
import os
from compressor.errors import UserError
from compressor.kernels.native import native, rung_and_why
for value in "auto", "neon", "portable", "avx2":
    os.environ["COMPRESSOR_KERNELS"] = value
    try:
        print(*rung_and_why(), sep=": ")
    except UserError as error:
        print(error)
print(native().file)
"""


@pytest.mark.parametrize(
    ("cpu", "said"),
    [
        (arm.WITH_DOT_PRODUCTS, [
            "neon: the best that this processor has", "neon: forced by COMPRESSOR_KERNELS",
            "portable: forced by COMPRESSOR_KERNELS", "COMPRESSOR_KERNELS=avx2, but this processor has no avx2",
        ]),
        (arm.WITHOUT, [
            "torch: the kernels are plain C++ on this processor",
            "COMPRESSOR_KERNELS=neon, but this processor has no neon",
            "portable: forced by COMPRESSOR_KERNELS", "COMPRESSOR_KERNELS=avx2, but this processor has no avx2",
        ]),
    ],
)  # fmt: skip
def test_the_rung_there(cpu: str, said: list[str], tmp_path: Path) -> None:
    """What `compressor kernels build` would have made is found; extensions for this machine are passed over."""
    arm.need_emulator()
    built = tmp_path / "compressor" / "kernels" / f"{source_digest()}{ABI3}"
    built.parent.mkdir(parents=True)
    shutil.copy(arm.kernels_for_arm(), built)
    told = arm.environment(XDG_CACHE_HOME=str(tmp_path))
    done = subprocess.run(arm.python(cpu, "-c", ASK), env=told, capture_output=True, text=True, check=True)
    *lines, file = done.stdout.splitlines()
    assert file == str(built)
    for line, beginning in zip(lines, said, strict=True):
        assert line.startswith(beginning), line
