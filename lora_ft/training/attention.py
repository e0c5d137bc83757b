"""Attention for rows that hold several documents, each seeing only itself.

transformers' own way on plain SDPA is one dense mask over the whole row: right, but its cost is the square of the sum
of the lengths. Here it is the sum of their squares.

    row        A A A B B C          dense mask: 36 scores, 21 of them thrown away
    positions  0 1 2 0 1 0          here: 9 + 4 + 1 scores

Shapes: B rows, S positions, H heads, K heads of keys, G = H / K, E entries a head, n documents of L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa

from lora_ft.model.machine import prefers_matmul_attention
from lora_ft.training.documents import DocumentMask, Layout, Run, mask_documents

DOCUMENTS = "sdpa_documents"
"""Name of this attention among transformers' (`model.config._attn_implementation`)."""


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

    A block of queries is multiplied with the keys up to its own end, so up to half of the square is never made. The G
    heads that share keys stand one below the other in one product, so keys are not repeated and their gradients add up.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        queries, keys, values = (layout.stack(states) for states in (q, k, v))
        out, kept = torch.empty_like(queries), []
        for batch in layout.batches:
            batch_keys, batch_values = (batch.cut(states, heads, 0, batch.length) for states in (keys, values))
            kept += [batch_keys, batch_values]
            for start, end in batch.blocks:
                block = batch.cut(queries, heads, start, end)
                future = _future(start, end, groups, q.dtype, q.device)
                scores = torch.baddbmm(future, block, batch_keys[:, :end].transpose(1, 2), alpha=scaling)
                probabilities = torch.softmax(scores, dim=-1)
                kept += [block, probabilities]
                batch.paste(torch.bmm(probabilities, batch_values[:, :end]), out, heads, start, end)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scaling, ctx.heads = layout, scaling, heads
        return layout.unstack(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, scaling, heads, kept = ctx.layout, ctx.scaling, ctx.heads, iter(ctx.saved_tensors)
        grad = layout.stack(grad)
        grad_q = torch.empty_like(grad)
        grad_k, grad_v = (grad.new_empty(len(grad), heads, grad.shape[2]) for _ in range(2))
        for batch in layout.batches:
            keys, values = next(kept), next(kept)
            batch_k, batch_v = torch.zeros_like(keys), torch.zeros_like(values)
            for start, end in batch.blocks:
                block, probabilities = next(kept), next(kept)
                grad_block = batch.cut(grad, heads, start, end)
                batch_v[:, :end].baddbmm_(probabilities.transpose(1, 2), grad_block)
                grad_p = torch.bmm(grad_block, values[:, :end].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
                grad_block_q = torch.baddbmm(block, grad_scores, keys[:, :end], beta=0, alpha=scaling)
                batch.paste(grad_block_q, grad_q, heads, start, end)
                batch_k[:, :end].baddbmm_(grad_scores.transpose(1, 2), block, alpha=scaling)
            batch.paste(batch_k, grad_k, heads, 0, batch.length)
            batch.paste(batch_v, grad_v, heads, 0, batch.length)
        return *(layout.unstack(states) for states in (grad_q, grad_k, grad_v)), None, None


@lru_cache(maxsize=64)
def _future(start: int, end: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of a block's queries [G·(end - start), end]: -inf for keys behind the query."""
    hidden = torch.full((end - start, end), float("-inf"), dtype=dtype, device=device)
    return hidden.triu_(start + 1).repeat(groups, 1)
