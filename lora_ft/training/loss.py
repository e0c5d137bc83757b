"""What a model scores on supervised tokens, without ever holding the logits of a batch.

Only positions with a label go through the head, a chunk at a time (`head`). Scoring every position and throwing most
of it away, as `logits = model(...).logits` does, is 60% of a training step at a vocabulary of 152,000.

Shapes: B rows, S positions, N supervised tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lora_ft.training.head import read_logit_transform, score_logits, score_tokens
from lora_ft.training.rows import find_tokens

IGNORE_INDEX = -100


@dataclass
class TokenScores(ModelOutput):
    """Every supervised token of a batch, in order; wrappers such as DDP look for tensors in a `ModelOutput`."""

    loss: Tensor | None = None
    """Negative log-likelihood [N], float32, in nats; differentiable."""
    is_top1: Tensor | None = None
    """Whether the token was the model's first choice [N]."""
    row: Tensor | None = None
    """Row of the batch the token stands in [N]."""
    entropy: Tensor | None = None
    """Entropy of the prediction [N], in nats, when asked for."""
    aux_loss: Tensor | None = None
    """Load-balancing loss of a mixture of experts, where its config asks for it."""


@dataclass(frozen=True)
class BatchScore:
    """Sums over the supervised tokens of a batch."""

    loss_sum: float
    """Negative log-likelihood, in nats."""
    num_correct: int
    """Tokens that were the model's first choice."""
    num_tokens: int
    """Supervised tokens."""


def score_batch(model: Any, batch: dict[str, Any]) -> BatchScore:
    """Sums over the supervised tokens of `batch` (input_ids, labels [B, S], and what the model needs beside them).

    The model is any causal language model of transformers, with or without an adapter; it needs no trainer.
    """
    add_scoring(model)
    scored = model(**batch, score=True)
    loss = scored.loss.detach().double()
    return BatchScore(float(loss.sum()), int(scored.is_top1.sum()), loss.numel())


def add_scoring(model: Any) -> None:
    """Lets `model(..., labels=labels, score=True)` return `TokenScores`; without `score` nothing changes.

    The way leads through the model's own `forward` because DDP, DeepSpeed and FSDP do their work around it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner.forward, ScoringForward):
        inner.forward = ScoringForward(inner)


class ScoringForward:
    """The forward of a causal language model that can also score."""

    def __init__(self, model: Any):
        self._model, self._forward = model, model.forward
        self._transform = read_logit_transform(model.config)
        functools.update_wrapper(self, self._forward)  # `generate` checks its arguments against the signature
        self._knows_logits = self._reproduces_logits()

    def __call__(
        self,
        *args: Any,
        score: bool = False,
        with_entropy: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`TokenScores` of the labels [B, S] if `score`, else the model's own output.

        position      0     1     2     3     4     5
        labels      -100  -100     q     r  -100     t     the token that stands there, where it is supervised
        scored at             q     r           t          the position before it, whose state predicts it
        """
        if not score:
            given = {"labels": labels, "shift_labels": shift_labels}
            return self._forward(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        if shift_labels is None:
            assert labels is not None, "a score is of labels"
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        row, position = torch.nonzero(shift_labels != IGNORE_INDEX, as_tuple=True)
        targets = shift_labels[row, position]
        config = self._model.config.get_text_config()
        has_router = getattr(config, "output_router_logits", False)
        kwargs |= {"return_dict": True, "use_cache": False}  # with a cache, packed rows are taken for ordinary ones
        if has_router:
            kwargs["output_router_logits"] = True
        if self._knows_logits:
            outputs = self._model.base_model(*args, **kwargs)
            hidden = outputs.last_hidden_state
            places = (row * hidden.shape[1] + position).to(hidden.device)  # another one, for a base on several GPUs
            chosen = hidden.flatten(0, 1).index_select(0, places)
            scores = score_tokens(self._model.get_output_embeddings(), chosen, targets, self._transform, with_entropy)
        else:
            outputs = self._forward(*args, **kwargs)
            scores = score_logits(outputs.logits[row, position], targets, with_entropy)
        aux_loss = _balance_experts(outputs.router_logits, config, find_tokens(kwargs)) if has_router else None
        return TokenScores(row=row.to(scores.loss.device), aux_loss=aux_loss, **scores._asdict())

    @torch.no_grad()
    def _reproduces_logits(self) -> bool:
        """Whether head and transform after the backbone give the model's own logits, tried on eight tokens.

        An architecture that scales its logits by a key nobody here has heard of would otherwise train on a wrong loss
        without a word. Shards cannot be tried; they are taken to behave as the whole does.
        """
        model, seen = self._model, []
        if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
            return True
        head = model.get_output_embeddings()
        was_training, ids = model.training, torch.arange(1, 9, device=model.device)[None]
        hook = model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model.eval()
        try:
            logits = self._forward(input_ids=ids, use_cache=False, return_dict=True).logits.float()
            if not seen or head is None:  # OPT's forward goes past its own backbone, to the decoder inside
                return False
            ours = self._transform.apply(head(seen[0].last_hidden_state).float())
        finally:
            hook.remove()
            model.train(was_training)
        return bool((logits - ours.to(logits.device)).norm() <= 0.02 * logits.norm())


def _balance_experts(router_logits: Any, config: Any, tokens: Tensor | None) -> Tensor:
    """How unevenly the experts of a mixture are used by the tokens (1, not 0, in [B, S]), padding left out.

    Source: Fedus et al. 2021, "Switch Transformers", equation 4; all mixtures in transformers take Mixtral's function.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, tokens)
