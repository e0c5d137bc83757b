"""The rows of a batch, laid out so that nothing is computed for nobody.

Shapes: B rows, S positions of the longest, T tokens in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_ft.data.collate import Collator
from lora_ft.data.render import IGNORE_INDEX
from lora_ft.model.machine import fill_up


@dataclass(frozen=True)
class RowJoiner:
    """The rows of a batch one after the other in a single row, each a document (or several) that sees only itself.

        rows            padded, B × S      joined, 1 × T
        A A A           A A A              A A A B B
        B B             B B p              0 1 2 0 1     position_ids

    A padded batch computes what nobody reads: 40% of it, for rows of mixed length.
    """

    pad_token_id: int
    """For `Collator`, which has nothing to pad here."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors [1, T]: input_ids, labels, position_ids; T is a multiple of 32, filled up at position 0."""
        documents = [{"seq_lengths": [len(row["input_ids"])], **row} for row in rows]
        batch = Collator(self.pad_token_id, flatten=True)(documents)
        num_tokens = batch["input_ids"].shape[1]
        missing = fill_up(num_tokens) - num_tokens
        fillers = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "position_ids": 0}
        return {name: torch.nn.functional.pad(batch[name], (0, missing), value=fillers[name]) for name in fillers}


def find_tokens(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Where tokens stand and no padding [B, S], as 1 and 0; None where the batch does not say.

    In packed rows padded slots have position 0, as the first token of a document, but none at position 1 follows them.
    """
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"]
    positions = inputs.get("position_ids")
    if positions is None:
        return None
    is_first = torch.nn.functional.pad(positions[:, 1:] == 1, (0, 1))
    return ((positions > 0) | is_first).long()
