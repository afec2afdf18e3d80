"""A mixture's experts as separate linear modules, in place of transformers' fused three-dimensional parameters.

transformers keeps the experts of a layer as ``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I). To calibrate,
compress and store them one by one they have to be modules: ``mlp.experts.3.gate_proj`` and so on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]) -> None:
        """Take over ``gate`` and ``up`` (I, H), ``down`` (H, I)."""
        super().__init__()
        self.gate_proj = linear_from_weight(gate)
        self.up_proj = linear_from_weight(up)
        self.down_proj = linear_from_weight(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, H) to (tokens, H)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class UnfusedExperts(nn.Module):
    """Drop-in for a fused experts module; its children are the experts, named by their numbers.

    An expert to which no token is routed is not called at all.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.num_experts = len(experts)
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    @classmethod
    def from_fused(cls, module: nn.Module) -> UnfusedExperts:
        """Split the experts of ``module``, on its device (the meta device too), each with storage of its own.

        Raises:
            ValueError: the module is of a kind that this class does not reproduce; says what is different.
        """
        if (reason := why_not_unfused(module)) is not None:
            raise ValueError(f"experts of type {type(module).__name__} cannot be taken apart: {reason}")
        gate_up, down = cast(Tensor, module.gate_up_proj), cast(Tensor, module.down_proj)
        act_fn = cast(Callable[[Tensor], Tensor], module.act_fn)
        experts = []
        for number in range(gate_up.shape[0]):
            gate, up = gate_up[number].detach().chunk(2, dim=0)
            experts.append(Expert(gate.clone(), up.clone(), down[number].detach().clone(), act_fn))
        return cls(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each token through its experts and add up the weighted results.

        Args:
            hidden_states: (tokens, H).
            top_k_index: (tokens, k) int64, the experts of each token; other numbers than 0 .. E-1 are ignored.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, H) in the dtype of ``hidden_states``.
        """
        result = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            if not 0 <= number < self.num_experts:
                continue
            choice, token = torch.where(number == top_k_index.T)
            output = self.get_submodule(str(number))(hidden_states[token]) * top_k_weights[token, choice, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result


def unfuse(model: nn.Module) -> list[str]:
    """Replace every fused experts module of ``model`` by :class:`UnfusedExperts`, in place.

    Returns:
        The module paths replaced, in the order of the model; empty for a dense model.

    Raises:
        ValueError: fused experts that cannot be taken apart; names the module and says why. Nothing is replaced then.
    """
    fused = [(name, module) for name, module in model.named_modules() if is_fused_experts(module)]
    for name, module in fused:
        if (reason := why_not_unfused(module)) is not None:
            raise ValueError(f"{name}: experts of type {type(module).__name__} cannot be taken apart: {reason}")
    for name, module in fused:
        model.set_submodule(name, UnfusedExperts.from_fused(module))
    return [name for name, _ in fused]


def is_fused_experts(module: nn.Module) -> bool:
    """Return whether a module holds several experts in one three-dimensional parameter."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3


def why_not_unfused(module: nn.Module) -> str | None:
    """Return what stands against taking a fused experts module apart, or None."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return f"its parameters are {', '.join(parameters)}; expected gate_up_proj and down_proj only"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    experts, width, hidden = gate_up.shape
    if tuple(down.shape) != (experts, hidden, width // 2) or width % 2:
        return f"gate_up_proj {list(gate_up.shape)} and down_proj {list(down.shape)} are not (E, 2I, H) and (E, H, I)"
    unusual = {"is_transposed": False, "has_bias": False, "has_post_expert_norm": False}
    usual = {"is_concatenated": True, "has_gate": True}
    for flag, expected in (unusual | usual).items():
        if getattr(module, flag, expected) is not expected:
            return f"{flag} is {getattr(module, flag)}"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return "it has a gate of its own (_apply_gate)"
    if not callable(getattr(module, "act_fn", None)):
        return "it has no act_fn"
    arguments = set(inspect.signature(module.forward).parameters)
    if not {"hidden_states", "top_k_index", "top_k_weights"} <= arguments:
        return f"its forward takes ({', '.join(sorted(arguments))})"
    return None


def linear_from_weight(weight: Tensor) -> nn.Linear:
    """Return a bias-free ``nn.Linear`` around ``weight`` (out, in) itself, on its device and without initialization."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return linear
