"""What a model scores on supervised tokens, without ever holding the logits of a batch.

Only positions with a label go through the head, a chunk at a time (`head`). Scoring every position and throwing most
of it away, as `logits = model(...).logits` does, is 60% of a training step at a vocabulary of 152,000.

Shapes: B rows, S positions, N supervised tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
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
        self._balance = find_balancing(model)
        functools.update_wrapper(self, self._forward)  # `generate` checks its arguments against the signature
        self._backbone = self._find_backbone()

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
        is_balanced = getattr(self._model.config.get_text_config(), "output_router_logits", False)
        balance = self._balance if is_balanced else None
        kwargs |= {"return_dict": True, "use_cache": False}  # with a cache, packed rows are taken for ordinary ones
        if balance is not None:
            kwargs["output_router_logits"] = True
        if self._backbone is not None:
            outputs = self._backbone(*args, **kwargs)
            hidden = outputs.last_hidden_state
            places = (row * hidden.shape[1] + position).to(hidden.device)  # another one, for a base on several GPUs
            chosen = hidden.flatten(0, 1).index_select(0, places)
            scores = score_tokens(self._model.get_output_embeddings(), chosen, targets, self._transform, with_entropy)
        else:
            outputs = self._forward(*args, **kwargs)
            scores = score_logits(outputs.logits[row, position], targets, with_entropy)
        aux_loss = None if balance is None else balance(outputs.router_logits, find_tokens(kwargs))
        return TokenScores(row=row.to(scores.loss.device), aux_loss=aux_loss, **scores._asdict())

    @torch.no_grad()
    def _find_backbone(self) -> nn.Module | None:
        """The module whose states, through head and transform, give the model's own logits, tried on eight tokens.

        None where no module does: an architecture that scales its logits by a key nobody here has heard of would
        otherwise train on a wrong loss without a word. Shards cannot be tried; they are taken to behave as the whole.
        """
        model, seen = self._model, {}
        if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
            return model.base_model
        head = model.get_output_embeddings()
        if head is None:
            return None
        was_training, ids = model.training, torch.arange(1, 9, device=model.device)[None]
        # OPT's forward goes past its own backbone, to the decoder inside
        tried = list(dict.fromkeys((model.base_model, model.get_decoder())))
        hooks = [
            each.register_forward_hook(lambda module, inputs, output: seen.update({module: output})) for each in tried
        ]
        model.eval()
        try:
            logits = self._forward(input_ids=ids, use_cache=False, return_dict=True).logits.float()
            for backbone in filter(seen.__contains__, tried):
                ours = self._transform.apply(head(seen[backbone].last_hidden_state).float())
                if (logits - ours.to(logits.device)).norm() <= 0.02 * logits.norm():
                    return backbone
        finally:
            for hook in hooks:
                hook.remove()
            model.train(was_training)
        return None


def find_balancing(model: Any) -> Callable[[Any, Tensor | None], Tensor] | None:
    """What tells how unevenly the experts of a mixture are used by the tokens (1, not 0, in [B, S]), padding left out.

    It is the architecture's own function, from its router's logits; None where it has no experts, or a function of
    another kind (Doge).

    Source: Fedus et al. 2021, "Switch Transformers", equation 4; transformers' `MixtralForCausalLM.forward`.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    num_experts, num_chosen = (getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok"))
    asked = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    if not num_experts or not num_chosen or function is None or list(inspect.signature(function).parameters) != asked:
        return None
    return lambda router_logits, tokens: function(router_logits, num_experts, num_chosen, tokens)
