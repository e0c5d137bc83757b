"""What an adapter does to a weight: one function a kind, on blocks of rows in fp32.

Legend: O outputs, I inputs, R rank, E experts, V vocabulary, D hidden. A block is a run of rows, so that a weight of
any size is merged in the same little memory:

    weight [6, I]   rows 0 1 | 2 3 | 4 5       delta of a block: B[rows] @ A, of rows 2 and 3 only
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ft.export.scratch import SCRATCH

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Update:
    """What one adapter does to one parameter."""

    kind: str
    """Key of `KINDS`."""
    scale: float
    """What the product of the factors is multiplied by: alpha / r or alpha / sqrt(r), times the adapter's weight."""
    tensors: Mapping[str, torch.Tensor]
    """The adapter's tensors by role: `A` [R, I], `B` [O, R], `magnitude` [O], `bias` [O], `rows` [tokens, D]."""
    experts: int = 1
    """How many experts the factors hold: `A` is [E·R, I], experts outermost, and `B` [O, R·E], experts innermost."""
    token_ids: tuple[int, ...] = ()
    """Rows of the parameter that `rows` replaces."""


@dataclass(frozen=True)
class Block:
    """Which rows of a parameter a piece of it holds."""

    start: int
    """First row."""
    stop: int
    """Row after the last."""
    expert: int | None = None
    """Index along the first dimension of a stack of experts; rows are counted within that expert then."""


@dataclass(frozen=True)
class Kind:
    """How updates of a kind are applied."""

    apply: Callable[[torch.Tensor, Update, Block], torch.Tensor]
    """The block's new value from its old one [rows, …] in fp32, which it may overwrite."""
    adds: bool
    """Whether it is a plain sum, so that several adapters may share a parameter, each with a weight."""
    whole: bool = False
    """Whether it needs all rows at once."""
    by_expert: bool = False
    """Whether it works on one matrix of a stack at a time."""


def add_product(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """weight [rows, I] + scale · B[rows] A."""
    return weight.add_(product(update, update.tensors["B"][block.start : block.stop], update.tensors["A"]))


def add_product_transposed(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """weight [rows of I, O] + scale · (B A[:, rows])ᵀ, for GPT-2's Conv1D and for embeddings (I is V there)."""
    return weight.add_(product(update, update.tensors["B"], update.tensors["A"][:, block.start : block.stop]).T)


def add_expert_product(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """weight [rows of O, I] of one expert + scale · B_e[rows] A_e."""
    factor_a, factor_b = expert_factors(update, block)
    return weight.add_(product(update, factor_b[block.start : block.stop], factor_a))


def add_expert_product_transposed(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """weight [rows of I, O] of one expert + scale · (B_e A_e[:, rows])ᵀ, for models that keep experts transposed."""
    factor_a, factor_b = expert_factors(update, block)
    return weight.add_(product(update, factor_b, factor_a[:, block.start : block.stop]).T)


def rescale_rows(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """magnitude / ‖weight + ΔW‖ · (weight + ΔW), with a norm a row.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """
    import torch

    weight = add_product(weight, update, block)
    norm = torch.linalg.norm(weight, dim=1)
    magnitude = update.tensors["magnitude"][block.start : block.stop].float()
    return weight.mul_((magnitude / norm).view(-1, 1))


def rescale_columns(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """DoRA on a transposed weight [I, O]: a norm a column, so all rows are needed at once."""
    import torch

    weight = add_product_transposed(weight, update, block)
    norm = torch.linalg.norm(weight.T, dim=1)
    return weight.mul_((update.tensors["magnitude"].float() / norm).view(1, -1))


def add_bias(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """bias [rows] + scale · the bias of B."""
    return weight.add_(update.tensors["bias"][block.start : block.stop].float() * update.scale)


def put_rows(weight: torch.Tensor, update: Update, block: Block) -> torch.Tensor:
    """weight [rows, D] with the trained tokens' rows in their place; PEFT trains rows, not a difference of rows."""
    for index, token in enumerate(update.token_ids):
        if block.start <= token < block.stop:
            weight[token - block.start] = update.tensors["rows"][index].float()
    return weight


KINDS = {
    "lora": Kind(add_product, adds=True),
    "lora_transposed": Kind(add_product_transposed, adds=True),
    "lora_experts": Kind(add_expert_product, adds=True, by_expert=True),
    "lora_experts_transposed": Kind(add_expert_product_transposed, adds=True, by_expert=True),
    "lora_bias": Kind(add_bias, adds=True),
    "dora": Kind(rescale_rows, adds=False),
    "dora_transposed": Kind(rescale_columns, adds=False, whole=True),
    "trainable_tokens": Kind(put_rows, adds=False),
}
"""Kind of update → how it is applied. A new kind is a function, a line here, a line in `targets`, and a test."""


def product(update: Update, factor_b: torch.Tensor, factor_a: torch.Tensor) -> torch.Tensor:
    """scale · B A in fp32, rounded as PEFT rounds it: the product first, then the factor."""
    import torch

    delta = SCRATCH.take("delta", (factor_b.shape[0], factor_a.shape[1]), torch.float32)
    if math.frexp(abs(update.scale))[0] == 0.5:  # a power of two rounds nothing, so the small factor may take it
        return torch.mm(factor_b.float() * update.scale, factor_a.float(), out=delta)
    return torch.mm(factor_b.float(), factor_a.float(), out=delta).mul_(update.scale)


def expert_factors(update: Update, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, I] and B [O, R] of the block's expert."""
    factor_a = update.tensors["A"].unflatten(0, (update.experts, -1))[block.expert]
    factor_b = update.tensors["B"].unflatten(1, (-1, update.experts))[..., block.expert]
    return factor_a, factor_b
