"""Rows become the tensors of one batch.

Shapes: B rows, S positions of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_ft.data.render import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Pads rows to one length, by position: what a padded slot holds never decides whether it counts.

        rows            A A A | B B             packed: A A A B B | C
        input_ids       A A A                   A A A B B
                        B B p                   C p p p p
        attention_mask  1 1 1                   none
                        1 1 0
        position_ids    none                    0 1 2 0 1
                                                0 0 0 0 0
        labels          -100 A A                -100 A A -100 B
                        -100 B -100             -100 -100 -100 -100 -100

    Rows with `seq_lengths` are packed. They get no attention mask: with one of ones beside them transformers takes the
    positions for ordinary ones and lets documents see each other. Every padded slot has position 0, which makes it a
    document of its own that nobody sees.
    Source: transformers `masking_utils.find_packed_sequence_indices`.
    """

    pad_token_id: int
    """Fills input_ids behind the end of a row; may be any token, the terminator too."""
    flatten: bool = False
    """Whether packed rows become one row of [1, sum of S] without padding, as FlashAttention wants them."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors [B, S]: input_ids, labels, and attention_mask, or position_ids where rows are packed."""
        if "seq_lengths" not in rows[0]:
            ones = [[1] * len(row["input_ids"]) for row in rows]
            return {**self._pad_tokens(rows), "attention_mask": pad(ones, 0)}
        if self.flatten:
            rows = [{name: [x for row in rows for x in row[name]] for name in ("input_ids", "labels", "seq_lengths")}]
        batch = self._pad_tokens(rows)
        positions = pad([[i for length in row["seq_lengths"] for i in range(length)] for row in rows], 0)
        batch["labels"] = batch["labels"].masked_fill(positions == 0, IGNORE_INDEX)
        return {**batch, "position_ids": positions}

    def _pad_tokens(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [row["labels"] for row in rows]
        is_class = isinstance(labels[0], int)
        return {
            "input_ids": pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": torch.tensor(labels) if is_class else pad(labels, IGNORE_INDEX),
        }


def pad(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """Integer rows as one tensor [B, S], filled up behind their ends."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long)
