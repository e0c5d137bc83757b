"""Where the documents of packed rows lie: what stands in for a dense mask, and which of them are multiplied together.

    row        A A A B B C          runs        one of length 3, one of 2, one of 1
    positions  0 1 2 0 1 0          batches     A and B, each filled up to the longer; C sees nobody else

Shapes: B rows, S positions, H heads, K heads of keys, G = H / K, E entries a head, n documents of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from lora_ft.model.machine import fill_up

CALL_PAIRS, BATCH_PAIRS = 2**15, 2**20
"""Pairs of query and key that take as long to multiply as one call more takes, and the most of one batch."""

SMALLEST_BLOCK = 64
"""Fewest queries that are multiplied at once; keys behind the last of them are left out."""

LONGEST_MATMUL = 1024
"""Longest document whose probabilities are kept for the backward pass: 2·H·L bytes a token are a burden beyond."""


@dataclass(frozen=True)
class Run:
    """Neighbouring documents of one length."""

    count: int
    """n."""
    length: int
    """L, in tokens."""
    window: Tensor | None = None
    """Who sees whom [n, 1, L, L], where a sliding window hides the start of a document from its end."""


@dataclass(frozen=True)
class DocumentMask:
    """What stands in for the dense mask [B, 1, S, S] of packed rows, as a `BlockMask` does for flex attention."""

    runs: tuple[Run, ...]
    """All documents of all rows, one row after the other."""
    device: torch.device
    """Where the tokens are."""

    @property
    def is_plain(self) -> bool:
        """Whether every document is short, and every token sees all before it."""
        return all(run.window is None and run.length <= LONGEST_MATMUL for run in self.runs)

    @cached_property
    def layout(self) -> Layout:
        """Documents at places of their own, filled up; laid out once for all layers."""
        lengths = [run.length for run in self.runs for _ in range(run.count)]
        starts = [0, *accumulate(lengths)]
        order = sorted((each for each, length in enumerate(lengths) if length > 1), key=lambda each: -lengths[each])
        batches = tuple(_batch_documents([lengths[each] for each in order]))
        gather: list[int] = []
        scatter = [-1] * starts[-1]
        filled = [batch.length for batch in batches for _ in range(batch.count)]
        for document, width in zip(order, filled, strict=True):
            start, length = starts[document], lengths[document]
            scatter[start : start + length] = range(len(gather), len(gather) + length)
            gather += [*range(start, start + length), *[-1] * (width - length)]
        gather = gather or [-1]  # where no document has a second token, so that there is a place to take zeros from
        return Layout(*_split_missing(gather, self.device), *_split_missing(scatter, self.device), batches)


@dataclass(frozen=True)
class Batch:
    """Documents that are multiplied together, each filled up to the longest, and that to a multiple of 32.

        A A A B B C        A A A -        count 2, length 4: one product for both. The one token of C is left out:
                           B B - -        nobody sees it, and it predicts nothing.

    What is filled in lies in the future of every token and is seen by none.
    """

    first: int
    """Place of its first token."""
    count: int
    """n."""
    length: int
    """P, places of a document."""

    @property
    def blocks(self) -> Iterator[tuple[int, int]]:
        """First query of each block, and its end; the more blocks, the less of the square is made, in more calls."""
        number = max(1, round((self.count * self.length**2 / (2 * CALL_PAIRS)) ** 0.5))
        size = max(SMALLEST_BLOCK, fill_up(-(-self.length // number)))
        for start in range(0, self.length, size):
            yield start, min(start + size, self.length)

    def cut(self, states: Tensor, key_heads: int, start: int, end: int) -> Tensor:
        """States by place [places, H, E], from `start` to `end` in each document: [n·K, G·(end - start), E]."""
        return self._view(states, key_heads)[:, :, :, start:end].flatten(2, 3).flatten(0, 1)

    def paste(self, block: Tensor, states: Tensor, key_heads: int, start: int, end: int) -> None:
        """Undoes `cut`."""
        there = self._view(states, key_heads)[:, :, :, start:end]
        there.copy_(block.view(there.shape))

    def _view(self, states: Tensor, key_heads: int) -> Tensor:
        """The batch's part of states by place [places, H, E]: [n, K, G, P, E]."""
        own = states[self.first : self.first + self.count * self.length]
        return own.view(self.count, self.length, key_heads, -1, states.shape[-1]).permute(0, 2, 3, 1, 4)


def _batch_documents(lengths: list[int]) -> Iterator[Batch]:
    """Documents of these lengths, the longest first, in batches.

    One joins the batch of those before it where what it is filled up with costs less than products of its own.
    """
    first, filled = 0, [fill_up(length) for length in lengths]
    while filled:
        longest = filled[0]
        most = max(1, BATCH_PAIRS // longest**2)
        shorter = (number for number, length in enumerate(filled[:most]) if longest**2 - length**2 > CALL_PAIRS)
        count = next(shorter, min(most, len(filled)))
        yield Batch(first, count, longest)
        first, filled = first + count * longest, filled[count:]


def _split_missing(indices: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where to take entries from, any one where it says -1, and which those are."""
    found = torch.tensor(indices, dtype=torch.long, device=device)
    return found.clamp(min=0), (found < 0).nonzero()[:, 0]


@dataclass(frozen=True)
class Layout:
    """Where tokens stand for matrix products: document by document, filled up."""

    gather: Tensor
    """Token at each place."""
    fillers: Tensor
    """Places that are only filled in."""
    scatter: Tensor
    """Place of each token."""
    left_out: Tensor
    """Tokens that have none."""
    batches: tuple[Batch, ...]
    """What is multiplied together, from the first place to the last."""

    def stack(self, states: Tensor) -> Tensor:
        """States of tokens [T, H, E] by place [places, H, E]; zeros are filled in."""
        return states.index_select(0, self.gather).index_fill_(0, self.fillers, 0)

    def unstack(self, stacked: Tensor) -> Tensor:
        """Undoes `stack`; tokens that were left out get zeros."""
        return stacked.index_select(0, self.scatter).index_fill_(0, self.left_out, 0)


def mask_documents(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> DocumentMask | Tensor | None:
    """The documents of packed rows; for anything else the mask of plain SDPA.

    transformers hands over a function that says whether query q sees key k. Asked along two diagonals it tells all: a
    document starts where a token does not see the one before it, and the rule is causal where none sees the one after.
    """
    if not (allow_is_causal_skip or use_vmap) and attention_mask is None and q_length == kv_length > 1:
        assert mask_function is not None, "transformers always gives one"
        row = torch.arange(batch_size, device=device)[:, None]
        place = torch.arange(q_length - 1, device=device)[None]
        sees_previous = mask_function(row, 0, place + 1, place).expand(batch_size, -1)
        if not mask_function(row, 0, place, place + 1).any():
            return DocumentMask(tuple(_find_runs(sees_previous, mask_function, local_size)), row.device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **options,
    )


def _find_runs(sees_previous: Tensor, sees: Callable[..., Tensor], window: int | None) -> Iterator[Run]:
    """The documents of rows whose tokens, from the second on, see the one before them or do not [B, S - 1]."""
    for row, joined in enumerate(sees_previous.tolist()):
        starts = [0, *(place for place, seen in enumerate(joined, start=1) if not seen)]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], len(joined) + 1], strict=True)]
        first = 0
        for length, run in groupby(lengths):
            count = len(list(run))
            if window is not None and length > window:
                begin = first + length * torch.arange(count, device=sees_previous.device)[:, None, None]
                inside = torch.arange(length, device=sees_previous.device)
                visible = sees(row, 0, begin + inside[:, None], begin + inside)
                yield Run(count, length, visible[:, None])
            else:
                yield Run(count, length)
            first += count * length
