"""Layers that keep less for the backward pass, and go over memory less often: RMSNorm, gated MLPs, LoRA.

                    transformers keeps                       kept here
    RMSNorm         x in float32                             x as it is
    gated MLP       gate, act(gate), up, act(gate)·up        gate, up

A class's name does not say what it computes, so each module is asked: its own forward is run on a few numbers, and it
is left as it is unless what comes out is what the short way makes of them.

Shapes: D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.model.lora_linear import (
    Activation,
    LoraForward,
    differentiate_gated,
    fused_lora,
    multiply_gated,
    replaced_forwards,
)

GATED = ("gate_proj", "up_proj", "down_proj")
"""What transformers calls the layers of a gated MLP."""
EPSILONS = ("variance_epsilon", "eps")
"""What it calls the number that keeps RMSNorm from dividing by zero."""


@contextmanager
def fused_layers(model: nn.Module, checkpointing: bool = False) -> Iterator[int]:
    """Within it, the model's norms, gated MLPs and LoRA layers go the short way; their number comes back.

    `checkpointing` says whether activations are computed again. Models whose weights are sharded are none for it: only
    a layer's own call gathers them.
    """
    short = {module: short for module in model.modules() if (short := _shorten(module)) is not None}
    with fused_lora(model, checkpointing) as number, replaced_forwards(short) as others:
        yield number + others


def _shorten(module: nn.Module) -> Any:
    """The short way through a module, if there is one."""
    if "forward" in module.__dict__:  # somebody else has changed it
        return None
    if _is_rms_norm(module):
        return _NormForward(module)
    return _GatedForward(module) if _is_gated(module) else None


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it computes w·x / √(mean x² + ε), with a w that is not trained, of numbers that are as small as ε."""
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) > 1 or module._modules or module._buffers or weight.ndim != 1:
        return False
    eps = _epsilon(module)
    if weight.requires_grad or not isinstance(eps, float):
        return False
    scales = torch.tensor([[1.0], [eps**0.5], [1e3]], device="cpu")
    numbers = scales * torch.arange(3.0 * len(weight), device="cpu").sin_().view(3, -1)
    twin = _copy(module)
    twin._parameters = {"weight": nn.Parameter(torch.arange(len(weight), device="cpu").cos(), requires_grad=False)}
    return _agree(twin, numbers, lambda: _RMSNorm.apply(numbers, twin._parameters["weight"], eps))


def _is_gated(module: Any) -> bool:
    """Whether it computes down(act(gate(x))·up(x)), whatever these three are."""
    if not set(GATED) <= set(module._modules) <= {*GATED, "act_fn"} or module._parameters or module._buffers:
        return False
    act = getattr(module, "act_fn", None)
    if act is None or (isinstance(act, nn.Module) and any(p.requires_grad for p in act.parameters())):
        return False
    scales = torch.tensor([[1.0], [30.0], [1e3]], device="cpu")  # some clamp what is large
    numbers = scales * torch.arange(24.0, device="cpu").sin_().view(1, 3, 8)
    gate, up = numbers.chunk(2, dim=-1)
    twin = _copy(module)
    twin._modules = {**module._modules, **dict(zip(GATED, (_Part(0), _Part(1), nn.Identity()), strict=True))}
    return _agree(twin, numbers, lambda: act(gate) * up)


def _copy(module: Any) -> Any:
    """A shallow copy that is in training: some drop numbers only then."""
    twin = copy.copy(module)
    twin.training = True
    return twin


class _Part(nn.Module):
    """The first half of a vector, or the second."""

    def __init__(self, number: int):
        super().__init__()
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 2·N] → [..., N]."""
        return x.chunk(2, dim=-1)[self._number]


def _agree(module: nn.Module, numbers: Tensor, short: Callable[[], Tensor]) -> bool:
    """Whether a module makes of `numbers` what the short way does."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found, expected = module.forward(numbers), short()
    except Exception:
        return False  # it wants to be told more than a layer is told here, and says so in its way
    is_like = isinstance(found, Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return is_like and torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def _epsilon(module: nn.Module) -> Any:
    return next((module.__dict__[name] for name in EPSILONS if name in module.__dict__), None)


class _NormForward:
    """The forward of one RMSNorm."""

    def __init__(self, module: nn.Module):
        self._module, self._forward, self._eps = module, module.forward, _epsilon(module)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] → [..., D]."""
        weight = self._module.weight
        if args or kwargs or x.dtype != weight.dtype:
            return self._forward(x, *args, **kwargs)
        return _RMSNorm.apply(x, weight, self._eps)


class _GatedForward:
    """The forward of one gated MLP."""

    def __init__(self, module: Any):
        self._module, self._forward = module, module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] → [..., D]."""
        if args or kwargs:
            return self._forward(x, *args, **kwargs)
        module = self._module
        gate, up, down, act = module.gate_proj(x), module.up_proj(x), module.down_proj, module.act_fn
        short = down.__dict__.get("forward")
        if isinstance(short, LoraForward) and not (down._forward_hooks or down._forward_pre_hooks):
            out = short.multiply_gated(act, gate, up)
            if out is not None:
                return out
        return down(_Gated.apply(act, gate, up))


class _RMSNorm(torch.autograd.Function):
    """w·x / √(mean x² + ε), computed in float32; w is frozen.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return torch.mul(wide, scale, out=None if wide is x else wide).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        normed, wide = x.float() * scale, (grad * weight).float()
        share = torch.linalg.vecdot(wide, normed).unsqueeze(-1).div_(-x.shape[-1])
        return wide.addcmul_(normed, share).mul_(scale).to(x.dtype), None, None


class _Gated(torch.autograd.Function):
    """act(gate)·up, of which neither act(gate) nor the product is kept."""

    @staticmethod
    def forward(ctx: Any, act: Activation, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return multiply_gated(act, gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        own = grad.clone(memory_format=torch.contiguous_format)  # what comes in may be another's too
        return None, *differentiate_gated(ctx.act, gate, up, own)
