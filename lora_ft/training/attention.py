"""Attention for rows that hold several documents, each seeing only itself.

transformers' own way on plain SDPA is one dense mask over the whole row: right, but its cost is the square of the sum
of the lengths. Here it is the sum of their squares.

    row        A A A B B C          dense mask: 36 scores, 21 of them thrown away
    positions  0 1 2 0 1 0          here: 9 + 4 + 1 scores

Shapes: B rows, S positions, H heads, K heads of keys, G = H / K, E entries a head, n documents of L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask

from lora_ft.model.machine import prefers_matmul_attention

DOCUMENTS = "sdpa_documents"
"""Name of this attention among transformers' (`model.config._attn_implementation`)."""

BLOCK = 128
"""Queries that are multiplied at once; keys behind the last of them are left out."""

ROUND_TO = 32
"""Documents are filled up to a multiple of this for matrix products."""

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
        gather: list[int] = []
        scatter: list[int] = []
        bounds: list[tuple[int, int]] = []
        first = 0
        num_tokens = sum(run.count * run.length for run in self.runs)
        for run in self.runs:
            for start in range(first, first + run.count * run.length, run.length):
                if run.length == 1:
                    scatter.append(-1)
                    continue
                begin, missing = len(gather), -run.length % ROUND_TO
                gather += [*range(start, start + run.length), *[num_tokens] * missing]
                scatter += range(begin, begin + run.length)
                bounds.append((begin, len(gather)))
            first += run.count * run.length
        places = [len(gather) if place < 0 else place for place in scatter]
        to_tensor = partial(torch.tensor, device=self.device)
        return Layout(to_tensor(gather, dtype=torch.long), to_tensor(places, dtype=torch.long), tuple(bounds))


@dataclass(frozen=True)
class Layout:
    """Where tokens stand for matrix products: by document, each filled up to P positions, a multiple of 32.

        tokens  A A A B C          P = 4 here:   A A A - | B - …   the one token of C is left out: nobody sees it,
                                                                   and it predicts nothing

    A product of a new shape takes as long to prepare as a small one to compute, and few lengths are multiples of 32.
    What is filled in lies in the future of every token and is seen by none.
    """

    gather: Tensor
    """Token at each place; the number of tokens where none is."""
    scatter: Tensor
    """Place of each token; the number of places for one that is left out."""
    bounds: tuple[tuple[int, int], ...]
    """First place and end of each document."""

    def stack(self, states: Tensor, key_heads: int) -> Tensor:
        """States of tokens [T, H, E] by place, with the heads that share keys together: [K, G, places, E]."""
        filled = torch.cat([states, states.new_zeros(1, *states.shape[1:])]).index_select(0, self.gather)
        return filled.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).contiguous()

    def unstack(self, stacked: Tensor) -> Tensor:
        """Undoes `stack`; tokens that were left out get zeros."""
        by_place = stacked.permute(2, 0, 1, 3).flatten(1, 2)
        return torch.cat([by_place, by_place.new_zeros(1, *by_place.shape[1:])]).index_select(0, self.scatter)


@contextmanager
def document_attention(model: Any) -> Iterator[None]:
    """Within it, a causal language model on plain SDPA attends document by document.

    Padded batches and generation go the way of plain SDPA as before, and a model that attends in another way (eager,
    FlashAttention) is left alone.
    """
    AttentionInterface.register(DOCUMENTS, attend_documents)
    AttentionMaskInterface.register(DOCUMENTS, mask_documents)
    was_sdpa = model.config._attn_implementation == "sdpa"
    copied: list[Any] = []
    if was_sdpa:
        model.set_attn_implementation(DOCUMENTS)
        copied = _find_configs(model, "sdpa")
    for config in copied:
        config._attn_implementation = DOCUMENTS
    try:
        yield
    finally:
        if was_sdpa:
            model.set_attn_implementation("sdpa")
        for config in copied:
            config._attn_implementation = "sdpa"


def _find_configs(model: nn.Module, attention: str) -> list[Any]:
    """Configs with this attention of single modules; PEFT copies a layer, to train or to repeat it, with its config."""
    owned = {id(config): config for module in model.modules() if (config := module.__dict__.get("config")) is not None}
    return [config for config in owned.values() if getattr(config, "_attn_implementation", None) == attention]


@torch.no_grad()
def keeps_documents_apart(model: Any) -> bool:
    """Whether a document scores the same behind another one in its row as alone, tried on eight tokens.

    It does not where layers carry a state along the row (Mamba, linear attention), or where an architecture takes no
    notice of `position_ids`; training on packed rows would go on without a word. Shards cannot be tried: there, the
    kinds of layers in the config decide, and whether positions reach the mask.
    """
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        return _reads_positions(model) and all(
            kind.endswith("_attention") and kind != "linear_attention" for kind in kinds
        )
    was_training, ids = model.training, torch.arange(1, 9, device=model.device)[None]
    places = torch.arange(4, device=model.device).repeat(2)[None]
    model.eval()
    try:
        behind = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 4:].float()
        alone = model(input_ids=ids[:, 4:], position_ids=places[:, 4:], use_cache=False).logits.float()
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.02
    return bool((behind - alone).norm() <= tolerance * alone.norm())


class _PositionsRead(Exception):
    """The mask is about to be made from positions."""


def _reads_positions(model: Any) -> bool:
    """Whether this kind of model makes its mask from `position_ids`, as one of its config without weights shows."""

    def stop(*args: Any) -> None:
        raise _PositionsRead

    config, find = copy.deepcopy(model.config), masking_utils.find_packed_sequence_indices
    if config._attn_implementation != "eager":
        config._attn_implementation = "sdpa"  # what a GPU's own kernels see has no meta device
    config.get_text_config().pad_token_id = None  # or some would look for it among tokens that have no value
    masking_utils.find_packed_sequence_indices = stop
    try:
        with torch.device("meta"):
            ids = torch.zeros(1, 8, dtype=torch.long)
            type(model)(config)(input_ids=ids, position_ids=ids, use_cache=False)
    except _PositionsRead:
        return True
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return False  # it cannot run without weights; rows are padded then, which is right everywhere
    finally:
        masking_utils.find_packed_sequence_indices = find
    return False


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


def attend_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DocumentMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, S, H, E] of queries [B, H, S, E], keys and values [B, K, S, E]; documents apart."""
    if not isinstance(attention_mask, DocumentMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    unsupported = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    if unsupported:
        raise ValueError(f"{DOCUMENTS} attention has no {unsupported[0]}; load the model with eager attention")
    batch, heads, length, entries = query.shape
    scaling = entries**-0.5 if scaling is None else scaling
    tokens = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    if dropout == 0.0 and attention_mask.is_plain and prefers_matmul_attention(query.device.type, query.dtype):
        attended = _MatmulAttention.apply(*tokens, attention_mask.layout, scaling)
    else:
        sizes = [run.count * run.length for run in attention_mask.runs]
        parts = zip(attention_mask.runs, *(states.split(sizes) for states in tokens), strict=True)
        attended = torch.cat([_attend_run(run, q, k, v, dropout, scaling) for run, q, k, v in parts])
    return attended.view(batch, length, heads, -1), None


def _attend_run(run: Run, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float) -> Tensor:
    """Attention output [n·L, H, E] of neighbouring documents, from queries [n·L, H, E], keys and values [n·L, K, E]."""
    q, k, v = (states.unflatten(0, (run.count, run.length)).transpose(1, 2) for states in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and not use_gqa_in_sdpa(run.window, k, v):  # grouped, a window would keep the scores of all pairs
        k, v = (repeat_kv(states, q.shape[1] // k.shape[1]) for states in (k, v))
        is_grouped = False
    out = nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=run.window,
        dropout_p=dropout,
        is_causal=run.window is None,
        scale=scaling,
        enable_gqa=is_grouped,
    )
    return out.transpose(1, 2).flatten(0, 1)


class _MatmulAttention(torch.autograd.Function):
    """Causal attention of documents as matrix products; queries [T, H, E], keys and values [T, K, E].

    A block of queries is multiplied with the keys up to its own end, so half of the square is never made. The G heads
    that share keys stand one below the other in one product, so keys are not repeated and their gradients add up.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        queries, keys, values = (layout.stack(states, heads) for states in (q, k, v))
        keys, values, out, kept = keys[:, 0], values[:, 0], torch.empty_like(queries), []
        for first, start, end in _blocks(layout.bounds):
            block = queries[:, :, start:end].flatten(1, 2)
            future = _future(start - first, end - first, groups, q.dtype, q.device)
            scores = torch.baddbmm(future, block, keys[:, first:end].transpose(1, 2), alpha=scaling)
            kept.append(torch.softmax(scores, dim=-1))
            out[:, :, start:end] = torch.bmm(kept[-1], values[:, first:end]).unflatten(1, (groups, -1))
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.layout, ctx.scaling = layout, scaling
        return layout.unstack(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        grad, groups = ctx.layout.stack(grad, len(keys)), queries.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for (first, start, end), probabilities in zip(_blocks(ctx.layout.bounds), kept, strict=True):
            block, grad_block = (states[:, :, start:end].flatten(1, 2) for states in (queries, grad))
            grad_v[:, first:end].baddbmm_(probabilities.transpose(1, 2), grad_block)
            grad_p = torch.bmm(grad_block, values[:, first:end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
            grad_block_q = torch.baddbmm(block, grad_scores, keys[:, first:end], beta=0, alpha=ctx.scaling)
            grad_q[:, :, start:end] = grad_block_q.unflatten(1, (groups, -1))
            grad_k[:, first:end].baddbmm_(grad_scores.transpose(1, 2), block, alpha=ctx.scaling)
        grads = (ctx.layout.unstack(states) for states in (grad_q, grad_k[:, None], grad_v[:, None]))
        return *grads, None, None


def _blocks(bounds: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int]]:
    """For each block of queries the first place of its document, its own first place, and its end."""
    for first, end in bounds:
        for start in range(first, end, BLOCK):
            yield first, start, min(start + BLOCK, end)


@lru_cache(maxsize=64)
def _future(start: int, end: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of a block's queries [G·(end - start), end]: -inf for keys behind the query."""
    hidden = torch.full((end - start, end), float("-inf"), dtype=dtype, device=device)
    return hidden.triu_(start + 1).repeat(groups, 1)
