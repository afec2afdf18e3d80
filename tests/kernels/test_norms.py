"""RMS norms by the kernels: against fp64 on every instruction set, and in place of models' own modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from compressor.hf import norms
from compressor.hf.norms import formula_of, quicken_norms
from compressor.kernels.matrix import DTYPES
from compressor.kernels.native import LEVELS, Native
from compressor.kernels.norm import MOST, Formula, can_normalize, rms_norm

CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FORMULAS = (Formula(1e-6, False, True), Formula(0.1, False, False), Formula(1e-5, True, False))
SHAPES = ((1, 16), (3, 48), (2, 5, 64), (1, 1, 1008), (2, 4096))


def reference(x: Tensor, weight: Tensor, formula: Formula) -> Tensor:
    """In fp64, rounded where the formula says so."""
    wide = x.double()
    wide = wide / (wide.pow(2).mean(-1, keepdim=True) + formula.eps).sqrt()
    if formula.rounded:
        wide = wide.to(x.dtype).double()
    return wide * (weight.double() + (1 if formula.more else 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "formula", [Formula(1e-6, False, True), Formula(0.1, False, False), Formula(1e-5, True, False)]
)
def test_against_fp64(formula: Formula, dtype: torch.dtype, kernels: Native) -> None:
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for size in (1e-3, 1.0, 100.0):
            x, weight = (
                (torch.randn(shape, generator=g) * size).to(dtype),
                torch.randn(shape[-1], generator=g).to(dtype),
            )
            want = reference(x, weight, formula)
            for level in kernels.levels:
                found = rms_norm(x, weight, formula, level)
                assert found.shape == x.shape and found.dtype == dtype
                # where the quotient is rounded, it may be to the neighbour
                off = CLOSE[dtype] * (3 if formula.rounded else 1) * want.abs() + torch.finfo(dtype).tiny
                assert bool(((found.double() - want).abs() <= off).all()), (shape, size, level)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, kernels: Native) -> None:
    x, weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype), torch.ones(64, dtype=dtype)
    for level in kernels.levels:
        want = rms_norm(x, weight, Formula(1e-6, False, True), level)
        for what in (float("nan"), float("inf"), float("-inf")):
            hurt = x.clone()
            hurt[1, 5] = what
            found = rms_norm(hurt, weight, Formula(1e-6, False, True), level)
            assert torch.equal(found[::2], want[::2]) and bool(found[1, 5].isnan())
        zeros = rms_norm(torch.zeros_like(x), weight, Formula(1e-6, False, True), level)
        assert not zeros.any()


def test_what_does_not_fit_is_an_error(kernels: Native) -> None:
    x, weight, out = torch.randn(2, 32), torch.ones(32), torch.full((2, 32), -7.0)
    right = [x.data_ptr(), weight.data_ptr(), out.data_ptr(), 2, 32, 0, 1e-6, 0, 1, 0]
    wrong: dict[int, list[Any]] = {
        0: [0, None, 1.5, x.data_ptr() + 2], 1: [0, weight.data_ptr() + 1], 2: [0, out.data_ptr() + 3],
        3: [-1, 1 << 40], 4: [0, 8, 17, 1 << 30], 5: [-1, 3], 6: ["much", None], 7: [-1, 2], 8: [2],
        9: [-1, len(LEVELS)],
    }  # fmt: skip
    for place, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="does not fit"):
                kernels.module.norm(*right[:place], value, *right[place + 1 :])
    for count in range(len(right)):
        with pytest.raises(ValueError, match="does not fit"):
            kernels.module.norm(*right[:count])
    with pytest.raises(ValueError, match="number of arguments"):
        kernels.module.norm(*right, 0)
    assert bool((out == -7).all())
    kernels.module.norm(*right)
    assert not bool((out == -7).any())


def test_what_is_left_to_pytorch() -> None:
    x, weight = torch.randn(2, 32), nn.Parameter(torch.ones(32))
    with torch.no_grad():
        assert can_normalize(x, weight) and can_normalize(x[:, None], weight)
        assert not can_normalize(x.half(), weight) and not can_normalize(x.double(), weight.double())
        assert not can_normalize(x.to("meta"), weight) and not can_normalize(x, weight.to("meta"))
        assert not can_normalize(x[:, :16], weight) and not can_normalize(x[0, 0], weight)
        assert not can_normalize(x[:, :24], weight[:24]) and not can_normalize(x, weight.repeat(2)[::2])
        assert not can_normalize(x[:0], weight) and not can_normalize(x.repeat(MOST // 32, 1), weight)
    assert not can_normalize(x, weight)  # of which a gradient may be wanted


def of_a_model(family: str, dtype: torch.dtype) -> list[nn.Module]:
    """The norms of a random model, their weights as training leaves them."""
    model = tiny_models.random_model(family, dtype=dtype, **SIZES)
    g = torch.Generator().manual_seed(1)
    found = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for module in found:
        weight: Any = module.weight
        weight.data.add_(torch.randn(weight.shape, generator=g).mul_(0.3).to(dtype))
    return found


SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
PLAIN = ("llama", "qwen2", "qwen3", "mistral", "phi3")
ONE_MORE = ("gemma2", "gemma3")
"""Whose weights are one more than what is stored."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PLAIN + ONE_MORE)
def test_norms_of_models_are_known(family: str, dtype: torch.dtype, kernels: Native) -> None:
    modules = of_a_model(family, dtype)
    assert len(modules) >= 5
    g = torch.Generator().manual_seed(2)
    for module in modules:
        weight: Any = module.weight
        x = torch.randn(2, 3, weight.numel(), generator=g).to(dtype)
        with torch.no_grad():
            want = module(x)
            for level in kernels.levels:
                quicken_norms(module, level)
                own: Any = vars(module)["forward"]
                formula: Formula = own.args[1]
                # in 16 bits the two families of formulas round in different places
                assert formula.more == (family in ONE_MORE)
                assert dtype == torch.float32 or formula.rounded != formula.more
                found = module(x)
                torch.testing.assert_close(found, want, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=0)
                assert dtype == torch.float32 or float((found != want).float().mean()) < 0.01
                quicken_norms(module, None)
                assert "forward" not in vars(module) and torch.equal(module(x), want)


class Strange(nn.Module):
    """Looks like a norm of the kind, and is another function."""

    def __init__(self, what: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.what = nn.Parameter(torch.rand(64)), 1e-6, what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x, self.weight)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def test_others_are_left_alone(kernels: Native) -> None:
    """Means that are taken away, another eps, sums, a second parameter, two inputs, no tensor, errors."""
    level = kernels.levels[-1]
    assert formula_of(Strange(plain), level) == Formula(1e-6, False, True)
    others: list[Callable[[Tensor, Tensor], Any]] = [
        lambda x, weight: plain(x - x.mean(-1, keepdim=True), weight),
        lambda x, weight: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        lambda x, weight: x * (x.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt() * weight,
        lambda x, weight: plain(x, weight) + 1e-3, lambda x, weight: plain(x, weight)[..., :32],
        lambda x, weight: plain(x, weight).double(), lambda x, weight: (plain(x, weight),),
        lambda x, weight: plain(x, weight[:5]),
    ]  # fmt: skip
    for what in others:
        assert formula_of(Strange(what), level) is None
    more = Strange(plain)
    more.bias = nn.Parameter(torch.zeros(64))
    odd, other = Strange(plain), Strange(plain)
    odd.weight = nn.Parameter(torch.rand(60))
    del other.weight
    other.weight, other.scale = torch.rand(64), nn.Parameter(torch.rand(64))
    for module in (more, odd, other, nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU()):
        assert formula_of(module, level) is None


def test_gradients_and_copies(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    real = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda x, *more: calls.append(x) or real(x, *more))
    module = of_a_model("llama", torch.float32)[0]
    x = torch.randn(1, 64)
    quicken_norms(module, kernels.levels[-1])
    calls.clear()
    module(x).sum().backward()
    weight: Any = module.weight
    assert not calls and weight.grad is not None
    with torch.no_grad():
        want = module(x)
        assert len(calls) == 1
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            weight.mul_(0)  # of the first
            assert torch.equal(other(x), want)
        assert len(calls) == 3 and not module(x).any()
