"""A LoRA layer as one step of autograd: eight matrix products and nothing between them.

PEFT's layer computes the same with some twenty-five operations: on a CPU it widens the input to float32 for autocast to
narrow it again, copies the base's output, and adds a scaled product to it; its backward pass undoes each of them. 4-bit
weights are unpacked twice a step; where memory allows, they are unpacked once for the whole training. Of a gated MLP's
last layer the input, act(gate)·up, is not kept for the backward pass but made again from gate and up, which are.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.model.machine import can_keep_unpacked

Activation = Callable[[Tensor], Tensor]
"""Elementwise, such as SiLU."""
BLOCK_ENTRIES = 2**20
"""Entries of gate and up that are worked on at once."""


@contextmanager
def fused_lora(model: nn.Module, checkpointing: bool = False) -> Iterator[int]:
    """Within it, the model's plain LoRA layers go the short way; their number comes back.

    `checkpointing` says whether activations are computed again: `can_keep_unpacked` asks.

    Layers that do more than x·Wᵀ + s·x·Aᵀ·Bᵀ (DoRA and other variants, a trained bias), or are sharded, keep PEFT's
    forward.
    """
    layers = [layer for layer in model.modules() if _is_plain_lora(layer)]
    bases = [layer.get_base_layer() for layer in layers]
    sizes = [_compute_dtype(base).itemsize * base.in_features * base.out_features for base in bases if _is_4bit(base)]
    keep = can_keep_unpacked(sum(sizes), checkpointing)
    with replaced_forwards({layer: LoraForward(layer, keep) for layer in layers}) as number:
        yield number


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[int]:
    """Within it, each of these modules has the forward beside it instead of its class's; their number comes back."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield len(forwards)
    finally:
        for module in forwards:
            del module.forward


def _is_plain_lora(layer: nn.Module) -> bool:
    from peft.tuners.lora import Linear, Linear4bit

    if type(layer) not in (Linear, Linear4bit) or len(layer.active_adapters) != 1 or "forward" in layer.__dict__:
        return False
    name, base = layer.active_adapters[0], layer.get_base_layer()
    is_matrix = type(base) is nn.Linear or _is_4bit(base)
    if name not in layer.lora_A or layer.lora_variant or not is_matrix or layer.fan_in_fan_out:
        return False
    factors = [*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters()]
    is_whole = len(factors) == 2 and not any(hasattr(p, "ds_id") for p in (*factors, base.weight))
    return is_whole and not any(p.requires_grad for p in base.parameters())


def _is_4bit(base: nn.Module) -> bool:
    import bitsandbytes

    return isinstance(base, bitsandbytes.nn.Linear4bit)


def _compute_dtype(base: Any) -> torch.dtype:
    """The type that a layer multiplies in."""
    return (base.compute_dtype if _is_4bit(base) else None) or base.weight.dtype


class LoraForward:
    """The forward of one LoRA layer; what it does not know goes to PEFT's."""

    def __init__(self, layer: Any, keep: bool):
        self._layer, self._forward = layer, layer.forward
        self._name, self._base = layer.active_adapters[0], layer.get_base_layer()
        self._weight = self._unpack() if keep and _is_4bit(self._base) else None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] → [..., O]."""
        if args or kwargs or not self._knows(x):
            return self._forward(x, *args, **kwargs)
        low = self._layer.lora_dropout[self._name](x)
        return _LoraLinear.apply(x, None if low is x else low, *self._read_factors(), self._read_weight)

    def multiply_gated(self, act: Activation, gate: Tensor, up: Tensor) -> Tensor | None:
        """act(gate)·up [..., I] → [..., O]; None where the product is needed once more, as by dropout."""
        if not self._knows(gate) or not isinstance(self._layer.lora_dropout[self._name], nn.Identity):
            return None
        return _GatedLoraLinear.apply(act, gate, up, *self._read_factors(), self._read_weight)

    def _knows(self, x: Tensor) -> bool:
        layer, kind, dtype = self._layer, x.device.type, _compute_dtype(self._base)
        if layer.disable_adapters or layer.merged or layer.active_adapters != [self._name] or x.dtype != dtype:
            return False
        return kind == "meta" or not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == dtype

    def _read_factors(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        layer, name = self._layer, self._name
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], self._base.bias

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
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = _rows(x if z is None else z)
        out, hidden = _multiply(x, low, a, b, scaling, bias, read())
        ctx.save_for_backward(low, hidden, a, b)
        ctx.scaling, ctx.read, ctx.has_dropout, ctx.shape = scaling, read, z is not None, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, hidden, a, b = ctx.saved_tensors
        grad = _rows(grad)
        grad_b, grad_hidden = _differentiate(grad, hidden, b, ctx.scaling)
        grad_a = (grad_hidden.t() @ low).float()
        grad_x = grad_z = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.read()
            if ctx.has_dropout:
                grad_z = (grad_hidden @ a).view(ctx.shape)
            else:
                grad_x.addmm_(grad_hidden, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_z, grad_a, grad_b, None, None, None


class _GatedLoraLinear(torch.autograd.Function):
    """The same of x = act(gate)·up, which is not kept: a few operations an entry make it again."""

    @staticmethod
    def forward(
        ctx: Any,
        act: Activation,
        gate: Tensor,
        up: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        bias: Tensor | None,
        read: Any,
    ) -> Tensor:
        x, a, b = multiply_gated(act, gate, up), a.to(gate.dtype), b.to(gate.dtype)
        out, hidden = _multiply(x, _rows(x), a, b, scaling, bias, read())
        ctx.save_for_backward(gate, up, hidden, a, b)
        ctx.act, ctx.scaling, ctx.read = act, scaling, read
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, hidden, a, b = ctx.saved_tensors
        grad = _rows(grad)
        grad_b, grad_hidden = _differentiate(grad, hidden, b, ctx.scaling)
        grad_x, grad_a = (grad @ ctx.read()).addmm_(grad_hidden, a), torch.zeros_like(a, dtype=torch.float32)

        def add_block(x: Tensor, rows: slice) -> None:
            grad_a.add_(grad_hidden[rows].t() @ x)

        grad_gate, grad_up = differentiate_gated(ctx.act, gate, up, grad_x.view(gate.shape), add_block)
        return None, grad_gate, grad_up, grad_a, grad_b, None, None, None


def multiply_gated(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate)·up [..., I], a block of rows after the other: act(gate) is never held as a whole."""
    out = up.new_empty(up.shape)
    for g, u, o in zip(*map(_split_rows, (gate, up, out)), strict=True):
        torch.mul(act(g), u, out=o)
    return out


def differentiate_gated(
    act: Activation, gate: Tensor, up: Tensor, grad: Tensor, see: Callable[[Tensor, slice], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; that of up takes the place of `grad`, that of their product, which is contiguous.

    `see` is shown the product, block by block, each with the rows [t, I] that it holds.
    """
    grad_gate, first = gate.new_empty(gate.shape), 0
    for g, u, d, o in zip(*map(_split_rows, (gate, up, grad, grad_gate)), strict=True):
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            activated = act(g)
        o.copy_(*torch.autograd.grad(activated, g, d * u))
        activated = activated.detach()
        if see is not None:
            see(activated * u, slice(first, first := first + len(g)))
        d.mul_(activated)
    return grad_gate, grad


def _split_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """Blocks of rows [t, I] of a tensor [..., I], each of about so many entries as a cache holds."""
    return _rows(tensor).split(max(1, BLOCK_ENTRIES // tensor.shape[-1]))


def _rows(tensor: Tensor) -> Tensor:
    """[T, I] of [..., I]."""
    return tensor.reshape(-1, tensor.shape[-1])


def _multiply(
    x: Tensor, low: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [..., O] of x [..., I] and of low [T, I], its way through the adapter; and low·Aᵀ [T, r].

    The output is no view: of a view from here, autograd lets nobody change anything in place, as OLMo does.
    """
    hidden = low @ a.t()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = _rows(out)
    if bias is None:
        torch.mm(_rows(x), weight.t(), out=rows)
    else:
        torch.addmm(bias.to(x.dtype), _rows(x), weight.t(), out=rows)
    rows.addmm_(hidden, b.t(), alpha=scaling)
    return out, hidden


def _differentiate(grad: Tensor, hidden: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Gradients of B [O, r], in float32, and of low·Aᵀ [T, r]; `grad` [T, O] is that of the output."""
    return (grad.t() @ hidden).float().mul_(scaling), (grad @ b).mul_(scaling)
