"""A LoRA layer as one step of autograd: eight matrix products and nothing between them.

PEFT's layer computes the same with some twenty-five operations: on a CPU it widens the input to float32 for autocast to
narrow it again, copies the base's output, and adds a scaled product to it; its backward pass undoes each of them. 4-bit
weights are unpacked twice a step; where memory allows, they are unpacked once for the whole training.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.model.machine import can_keep_unpacked, prefers_fused_lora


@contextmanager
def fused_lora(model: nn.Module, checkpointing: bool = False) -> Iterator[int]:
    """Within it, the model's plain LoRA layers go the short way; their number comes back.

    `checkpointing` says whether activations are computed again: `can_keep_unpacked` asks.

    Layers that do more than x·Wᵀ + s·x·Aᵀ·Bᵀ (DoRA and other variants, a trained bias), are sharded, or lie on a device
    where the short way is not known to be faster keep PEFT's forward.
    """
    layers = [layer for layer in model.modules() if _is_plain_lora(layer)]
    bases = [layer.get_base_layer() for layer in layers]
    sizes = [_compute_dtype(base).itemsize * base.in_features * base.out_features for base in bases if _is_4bit(base)]
    keep = can_keep_unpacked(sum(sizes), checkpointing)
    for layer in layers:
        layer.forward = _FusedForward(layer, keep)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _is_plain_lora(layer: nn.Module) -> bool:
    from peft.tuners.lora import Linear, Linear4bit

    if type(layer) not in (Linear, Linear4bit) or len(layer.active_adapters) != 1:
        return False
    name, base = layer.active_adapters[0], layer.get_base_layer()
    is_matrix = type(base) is nn.Linear or _is_4bit(base)
    if name not in layer.lora_A or layer.lora_variant or not is_matrix or layer.fan_in_fan_out:
        return False
    factors = [*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters()]
    is_whole = len(factors) == 2 and not any(hasattr(p, "ds_id") or p.is_meta for p in (*factors, base.weight))
    is_frozen = not any(p.requires_grad for p in base.parameters())
    return is_whole and is_frozen and prefers_fused_lora(base.weight.device.type)


def _is_4bit(base: nn.Module) -> bool:
    import bitsandbytes

    return isinstance(base, bitsandbytes.nn.Linear4bit)


def _compute_dtype(base: Any) -> torch.dtype:
    """The type that a layer multiplies in."""
    return (base.compute_dtype if _is_4bit(base) else None) or base.weight.dtype


class _FusedForward:
    """The forward of one LoRA layer; what it does not know goes to PEFT's."""

    def __init__(self, layer: Any, keep: bool):
        self._layer, self._forward = layer, layer.forward
        self._name, self._base = layer.active_adapters[0], layer.get_base_layer()
        self._weight = self._unpack() if keep and _is_4bit(self._base) else None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] → [..., O]."""
        layer, name = self._layer, self._name
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            return self._forward(x, *args, **kwargs)
        kind, dtype = x.device.type, _compute_dtype(self._base)
        if x.dtype != dtype or (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype):
            return self._forward(x)
        low = layer.lora_dropout[name](x)
        return _LoraLinear.apply(
            x,
            None if low is x else low,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            self._base.bias,
            self._read_weight,
        )

    def _read_weight(self) -> Tensor:
        if self._weight is not None:
            return self._weight
        return self._unpack() if _is_4bit(self._base) else self._base.weight

    def _unpack(self) -> Tensor:
        """The 4-bit weight [O, I] in the type the layer computes in."""
        from bitsandbytes.functional import dequantize_4bit

        weight = self._base.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(_compute_dtype(self._base))


class _LoraLinear(torch.autograd.Function):
    """x·Wᵀ + b + s·z·Aᵀ·Bᵀ, where z is x after dropout; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None, read: Any
    ) -> Tensor:
        weight, (a, b) = read(), (a.to(x.dtype), b.to(x.dtype))
        low = (x if z is None else z).flatten(0, -2)
        hidden = low @ a.t()
        out = nn.functional.linear(x.flatten(0, -2), weight, bias if bias is None else bias.to(x.dtype))
        out.addmm_(hidden, b.t(), alpha=scaling)
        ctx.save_for_backward(low, hidden, a, b)
        ctx.scaling, ctx.read, ctx.has_dropout, ctx.shape = scaling, read, z is not None, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, hidden, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_hidden = (grad @ b).mul_(ctx.scaling)
        grad_a = (grad_hidden.t() @ low).float()
        grad_b = (grad.t() @ hidden).float().mul_(ctx.scaling)
        grad_x = grad_z = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.read()
            if ctx.has_dropout:
                grad_z = (grad_hidden @ a).view(ctx.shape)
            else:
                grad_x.addmm_(grad_hidden, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_z, grad_a, grad_b, None, None, None
