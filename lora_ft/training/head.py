"""From the last hidden states to the loss of each token, a chunk of logits at a time.

`cross_entropy(head(hidden).float(), targets)` holds the logits of a batch three times over: in the type of the head, in
float32, and as a gradient. Here a chunk of them is held once, and turned into its own gradient in place.

Shapes: N tokens to score, n of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ft.model.machine import choose_head_columns, count_logits_rows, fill_up, has_triton_loss

BLOCK_BYTES = 2 * 2**20
"""Logits in float32 at once: few enough to stay in a CPU's cache while six operations go over them."""


class Scores(NamedTuple):
    """What tokens score, one entry a token."""

    loss: Tensor
    """Negative log-likelihood [N], float32, in nats; differentiable."""
    is_top1: Tensor
    """Whether the token was the model's first choice [N]."""
    entropy: Tensor | None
    """Entropy of the prediction [N], in nats, when asked for."""


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the output of its head before it is a logit."""

    num_logits: int
    """V; a head that is sharded or packed in 4 bit does not tell by its shape."""
    scale: float = 1.0
    """Factor; Cohere and Granite have one."""
    softcap: float | None = None
    """c in c·tanh(z/c); Gemma 2 bounds its logits so."""

    def apply(self, raw: Tensor) -> Tensor:
        """The logits [n, V] of the head's output [n, V]."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d logits / d raw, element by element, at these logits [n, V]."""
        return self.scale if self.softcap is None else (1 - (logits / self.softcap).square()) * self.scale


def read_logit_transform(config: Any) -> LogitTransform:
    """How a model with this config turns the output of its head into logits.

    Source: the `forward` of the architectures in transformers; `trl.trainer.utils.add_fused_lm_head` reads these keys.
    """
    config = config.get_text_config()
    factors = [getattr(config, key, None) for key in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it
    if divisor is not None:
        factors.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
    scale = next((factor for factor in factors if factor is not None), 1.0)
    return LogitTransform(config.vocab_size, scale, getattr(config, "final_logit_softcapping", None))


def score_tokens(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: LogitTransform, with_entropy: bool = False
) -> Scores:
    """Scores of the tokens `targets` [N] after the states `hidden` [N, D].

    A head that is a frozen matrix has the gradients made in the forward pass: two matrix products instead of three.
    Any other (with an adapter, trained itself, sharded, offloaded) is called as the module it is, and each chunk is
    computed again in the backward pass.
    """
    device = next(head.parameters()).device
    hidden, targets = hidden.to(device), targets.to(device)
    if not _is_frozen_matrix(head):
        return _score_in_chunks(head, hidden, targets, transform, with_entropy)
    if has_triton_loss(device.type):
        return _score_with_triton(head, hidden, targets, transform, with_entropy)
    return Scores(*_FrozenHead.apply(hidden, head.weight, head.bias, targets, transform, with_entropy))


def score_logits(logits: Tensor, targets: Tensor, with_entropy: bool = False) -> Scores:
    """Scores of the tokens `targets` [n] under logits [n, V], by plain differentiable operations."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    loss = -log_probs.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1) if with_entropy else None
    return Scores(loss, logits.detach().argmax(-1) == targets, entropy)


def _is_frozen_matrix(head: nn.Module) -> bool:
    """Whether the head is a plain linear layer nobody trains, shards, offloads or watches."""
    watched = head._forward_pre_hooks or head._forward_hooks or hasattr(head, "_hf_hook")
    return type(head) is nn.Linear and not watched and not any(p.requires_grad for p in head.parameters())


def _score_in_chunks(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: LogitTransform, with_entropy: bool
) -> Scores:
    def score_chunk(hidden: Tensor, targets: Tensor) -> Scores:
        return score_logits(transform.apply(head(hidden).float()), targets, with_entropy)

    rows = count_logits_rows(len(targets), transform.num_logits)
    chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    chunks += [(hidden[:0], targets[:0])] * (_agree_on_calls(head, len(chunks), hidden.device) - len(chunks))
    scored = [checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    loss, is_top1, entropy = zip(*scored, strict=True)
    return Scores(torch.cat(loss), torch.cat(is_top1), torch.cat(entropy) if with_entropy else None)


def _agree_on_calls(head: nn.Module, num_calls: int, device: torch.device) -> int:
    """How often this rank calls the head: where it is sharded, as often as the rank that has most to score.

    Each call gathers the head from all ranks. One that called it less often would answer the last calls of the others
    with whatever it gathers next.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        return num_calls
    most = torch.tensor(num_calls, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _score_with_triton(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: LogitTransform, with_entropy: bool
) -> Scores:
    """TRL's kernel folds a tile of logits in one pass, where PyTorch's operations would go over it six times."""
    from trl.kernels import ChunkedLogProbFunction

    tile_columns, temperature = 32768, 1.0
    wanted = ("log_probs", "is_top1", *(["entropy"] if with_entropy else []))
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, temperature, tile_columns, transform.softcap, transform.scale, wanted
    )
    return Scores(-log_probs, is_top1.bool(), entropy.detach() if with_entropy else None)


class _FrozenHead(torch.autograd.Function):
    """Scores, with the gradient of each token's loss by its own hidden state made on the way.

    A token's loss depends on no other token's state, so the gradient of any weighting of the losses is that of each
    one times its weight; nothing of the size of the vocabulary is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = _product_dtype(weight)
        weight, bias, states = weight.to(dtype), None if bias is None else bias.to(dtype), hidden.to(dtype)
        loss = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(loss) if with_entropy else None
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        rows = count_logits_rows(len(hidden), weight.shape[0])
        missing = fill_up(len(hidden)) - len(hidden)
        states = nn.functional.pad(states, (0, 0, 0, missing))  # so that few shapes are ever multiplied
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        columns = choose_head_columns(hidden.device.type, dtype) or weight.shape[0]
        buffer = torch.empty(rows, weight.shape[0], dtype=dtype, device=hidden.device)
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            logits = buffer[: len(states[chunk])]
            for block, part in zip(weight.split(columns), logits.split(columns, dim=1), strict=True):
                torch.mm(states[chunk], block.t(), out=part)
            if bias is not None:
                logits += bias
            parts = loss[chunk], is_top1[chunk], None if entropy is None else entropy[chunk]
            scored = logits[: len(targets[chunk])]
            _score_and_differentiate(scored, targets[chunk], transform, Scores(*parts), gradient is not None)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[chunk])
        ctx.save_for_backward(*([] if gradient is None else [gradient[: len(hidden)]]))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*[part for part in (is_top1, entropy) if part is not None])
        return loss, is_top1, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(ctx.dtype), None, None, None, None, None


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The type a linear layer with this weight computes in here: autocast does not reach into our own function."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _score_and_differentiate(
    raw: Tensor, targets: Tensor, transform: LogitTransform, scores: Scores, with_gradient: bool
) -> None:
    """Fills `scores` of one chunk; with `with_gradient`, turns the head's output `raw` [n, V] into d loss / d raw.

    The loss is log Σ exp(z - max z) + max z - z[target], and the sum is one over the largest probability.
    """
    rows = max(1, BLOCK_BYTES // (raw.shape[1] * 4))
    wide = torch.empty(min(rows, len(raw)), raw.shape[1], device=raw.device)
    narrow = torch.empty_like(wide)
    for start in range(0, len(raw), rows):
        block, target = raw[start : start + rows], targets[start : start + rows, None]
        logits = transform.apply(wide[: len(block)].copy_(block))
        probabilities = torch.softmax(logits, dim=-1, out=narrow[: len(block)])
        peak, aim = logits.amax(-1), logits.gather(-1, target)[:, 0]
        log_sum = -probabilities.amax(-1).log()
        scores.loss[start : start + rows] = log_sum + (peak - aim)
        scores.is_top1[start : start + rows] = _is_first_peak(logits, target[:, 0], peak == aim)
        if scores.entropy is not None:
            scores.entropy[start : start + rows] = log_sum + peak - (probabilities * logits).sum(-1)
        if with_gradient:
            probabilities.scatter_add_(-1, target, torch.full_like(aim, -1.0)[:, None])
            block.copy_(probabilities.mul_(transform.derivative(logits)))


def _is_first_peak(logits: Tensor, targets: Tensor, at_peak: Tensor) -> Tensor:
    """Whether the target is the first of the largest logits: `argmax`, which is slow, only of rows that may say yes."""
    rows = at_peak.nonzero()[:, 0]
    return at_peak.index_put((rows,), logits[rows].argmax(-1) == targets[rows])
