"""Documents packed into rows of fixed length, without letting them see each other.

Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lora_ft.data.render import Document
from lora_ft.errors import UserError


@dataclass(frozen=True)
class PackedRow:
    """Whole documents, one after the other."""

    input_ids: list[int]
    """Tokens; at most `row_length`."""
    labels: list[int]
    """Targets; IGNORE_INDEX where no loss is wanted and on each document's first token."""
    seq_lengths: list[int]
    """Length of each document, in order; positions restart at 0 for each."""


@dataclass(frozen=True)
class PackingPlan:
    """Which documents share a row, by number; 16 bytes a document. A sequence of rows, each in order of arrival."""

    documents: np.ndarray
    """Numbers of the documents, row after row."""
    starts: np.ndarray
    """Where each row starts in `documents`, and where the last one ends."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.documents[start:end] for start, end in pairwise(self.starts))


def plan_rows(lengths: np.ndarray, row_length: int) -> PackingPlan:
    """Rows filled best-fit-decreasing, so that hardly a slot stays empty.

    Documents are taken from the longest to the shortest; each goes to the row with the least room that still holds it.
    `open_rooms` is a set of numbers, the bits of one integer: the smallest room of at least n is its lowest bit from n.
    """
    row_length = min(row_length, int(lengths.sum()))  # one row for all; a longer one would only be emptier
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows_by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    open_rooms, num_rows = 0, 0
    for document in np.argsort(-lengths, kind="stable"):
        length = int(lengths[document])
        larger = open_rooms >> length
        if larger:
            room = length + (larger & -larger).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = row_length, num_rows
            num_rows += 1
        row_of[document] = row
        rows_by_room[room - length].append(row)
        open_rooms |= 1 << (room - length)
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    row_of = np.argsort(np.argsort(first))[row_of]  # rows in the order of their first documents
    sizes = np.bincount(row_of, minlength=num_rows)
    return PackingPlan(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))


def pack_documents(documents: Sequence[Document], row_length: int) -> list[PackedRow]:
    """Rows filled best-fit-decreasing; the order inside a row is the order of arrival.

        documents  A A A | B B | C        row_length 6
        positions  0 1 2   0 1   0        a plain causal mask would let B read A: the loss looks
        B may see          B B            better than it is, and the adapter learns to peek

    Raises:
        UserError: a document is longer than `row_length`; names its row, its length, the limit, and what to change.
    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.
    """
    for document in documents:
        if len(document.input_ids) > row_length:
            rule = f"A packed row takes whole documents of at most {row_length} tokens."
            raise UserError(document.place, f"{len(document.input_ids)} tokens", rule, "Raise data.max_length.")
    plan = plan_rows(np.array([len(document.input_ids) for document in documents], dtype=np.int64), row_length)
    return [_join([documents[number] for number in row]) for row in plan]


def _join(documents: Sequence[Document]) -> PackedRow:
    return PackedRow(
        [token for document in documents for token in document.input_ids],
        [label for document in documents for label in document.labels],
        [len(document.input_ids) for document in documents],
    )
