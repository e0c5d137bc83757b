"""Figures of training and evaluation as means over tokens, summed on the device and read rarely.

A mean of the batches' means, as TRL logs it, gives a token more weight the fewer stand beside it; and to read a number
after every batch makes the processor wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ft.training.loss import TokenScores


def sum_rows(scores: TokenScores, num_rows: int) -> Tensor:
    """Loss, tokens right, supervised tokens and entropy of each row of a batch [num_rows, 4]."""
    assert scores.loss is not None and scores.is_top1 is not None and scores.row is not None
    loss = scores.loss.detach()
    entropy = torch.zeros_like(loss) if scores.entropy is None else scores.entropy
    tokens = torch.stack([loss, scores.is_top1.to(loss.dtype), torch.ones_like(loss), entropy], dim=1)
    return loss.new_zeros(num_rows, 4).index_add_(0, scores.row.to(loss.device), tokens)


def wide_float(device: torch.device) -> torch.dtype:
    """The widest floating type that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenMeter:
    """Sums since they were last read."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """Loss, tokens right, supervised tokens, entropy, balancing loss, batches; None where nothing was taken in."""

    def add(self, rows: Tensor, aux_loss: Tensor | None = None) -> None:
        """Takes in the rows of a batch [num_rows, 4] as `sum_rows` gives them, and the batch's balancing loss."""
        balance = rows.new_zeros(1) if aux_loss is None else aux_loss.detach().to(rows).view(1)
        sums = torch.cat([rows.sum(0), balance, rows.new_ones(1)])
        sums = sums.to(wide_float(sums.device))
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Means over the supervised tokens since the last reading, over all ranks if `reduce` adds up their sums.

        Nothing where nothing was taken in; `entropy` and `aux_loss` (a mean over batches) only where they were made.
        """
        if self.sums is None:
            return {}
        loss, correct, supervised, entropy, aux_loss, batches = reduce(self.sums).tolist()
        self.sums = None
        tokens = max(supervised, 1.0)
        figures = {"loss": loss / tokens, "mean_token_accuracy": correct / tokens}
        if entropy:
            figures["entropy"] = entropy / tokens
        if aux_loss:
            figures["aux_loss"] = aux_loss / batches
        return figures
