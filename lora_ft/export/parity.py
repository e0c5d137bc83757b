"""Whether a merged model says what base and adapter said: logits, probabilities, and greedy answers.

Legend: S positions compared of one prompt (its last ones), V vocabulary, or labels for a classifier.

The merged model is held against base + adapter, and the difference against what the adapter has done to the base:

    base ──────── effect ────────► base + adapter ◄─ difference ─ merged

Rounding the merged weights to 16 bit makes a difference that is small for any sound merge; but if an adapter has learnt
little, it can be as large as the effect, and the merged model is then no longer the one that was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ft.export.samples import evaluation_mode, prompt_logits

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

MAX_POSITIONS = 64
"""Positions of a prompt that are compared, counted from its end."""
NEW_TOKENS = 16
"""Length of the greedy answers that are compared, in tokens."""
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Type of the merged weights → largest logit difference allowed, as a share of the largest logit (1 at least)."""
LOST_SHARE = 0.5
"""Share of the adapter's effect that rounding may take."""


@dataclass(frozen=True)
class Parity:
    """How far a merged model is from base + adapter."""

    num_prompts: int
    """Prompts compared."""
    num_positions: int
    """Positions compared, of all prompts together."""
    max_logit: float
    """Largest logit of base + adapter, in absolute value."""
    max_logit_difference: float
    """Largest difference of a logit."""
    mean_logit_difference: float
    """Mean difference of a logit, in absolute value."""
    mean_adapter_effect: float
    """Mean difference of a logit between the base and base + adapter, in absolute value."""
    mean_kl_divergence: float
    """Mean over positions of KL(base + adapter ‖ merged), in nats."""
    top_token_agreement: float
    """Share of positions whose likeliest token is the same."""
    greedy_agreement: float | None
    """Share of prompts that are answered alike, token for token, by greedy decoding; None for a classifier."""

    def faults(self, dtype: str) -> list[str]:
        """What keeps this from being a proof, for merged weights of `dtype`."""
        faults = []
        allowed = TOLERANCE[dtype] * max(1.0, self.max_logit)
        if not self.max_logit_difference <= allowed:
            faults.append(f"a logit differs by {self.max_logit_difference:.2e}; {allowed:.2e} is allowed for {dtype}")
        if not self.mean_logit_difference <= LOST_SHARE * self.mean_adapter_effect:
            lost = f"{self.mean_logit_difference:.2e} a logit, against an effect of {self.mean_adapter_effect:.2e}"
            faults.append(f"rounding to {dtype} takes too much of what the adapter learnt ({lost})")
        return faults


@dataclass(frozen=True)
class PromptDifference:
    """How far two models are apart on one prompt."""

    positions: int
    """Positions compared."""
    max_logit: float
    """Largest logit of the reference, in absolute value."""
    max_logit_difference: float
    """Largest difference of a logit."""
    sum_logit_difference: float
    """Mean difference of a logit at a position, summed over positions."""
    sum_kl_divergence: float
    """KL(reference ‖ other), summed over positions."""
    num_same_tokens: int
    """Positions whose likeliest token is the same."""


@dataclass(frozen=True)
class Reference:
    """What base + adapter say to one prompt."""

    prompt: Sequence[int]
    """Token ids."""
    logits: torch.Tensor
    """[S, V] in fp32, at its last positions."""
    adapter_effect: float
    """Mean difference of a logit to the base alone, in absolute value."""
    answer: list[int]
    """The likeliest continuation, token by token; empty for a classifier."""


def record_references(tuned: PeftModel, prompts: Sequence[Sequence[int]]) -> list[Reference]:
    """What base + adapter say to each prompt."""
    references = []
    with evaluation_mode(tuned):
        for prompt, answer in zip(prompts, greedy_answers(tuned, prompts), strict=True):
            logits = last_logits(tuned, prompt)
            with tuned.disable_adapter():
                effect = (last_logits(tuned, prompt) - logits).abs().mean().item()
            references.append(Reference(prompt, logits, effect, answer))
    return references


def compare_with_references(merged: PreTrainedModel, references: Sequence[Reference]) -> Parity:
    """How far `merged` is from base + adapter."""
    with evaluation_mode(merged):
        found = [compare_logits(reference.logits, last_logits(merged, reference.prompt)) for reference in references]
        answers = greedy_answers(merged, [reference.prompt for reference in references])
    same = [answer == reference.answer for answer, reference in zip(answers, references, strict=True)]
    positions = sum(difference.positions for difference in found)
    return Parity(
        num_prompts=len(references),
        num_positions=positions,
        max_logit=largest(difference.max_logit for difference in found),
        max_logit_difference=largest(difference.max_logit_difference for difference in found),
        mean_logit_difference=sum(difference.sum_logit_difference for difference in found) / positions,
        mean_adapter_effect=sum(reference.adapter_effect for reference in references) / len(references),
        mean_kl_divergence=sum(difference.sum_kl_divergence for difference in found) / positions,
        top_token_agreement=sum(difference.num_same_tokens for difference in found) / positions,
        greedy_agreement=sum(same) / len(same) if merged.can_generate() else None,
    )


def compare_logits(reference: torch.Tensor, other: torch.Tensor) -> PromptDifference:
    """How far two logits [S, V] are apart."""
    import torch

    gap = (other - reference).abs()
    expected, found = torch.log_softmax(reference.double(), -1), torch.log_softmax(other.double(), -1)
    return PromptDifference(
        positions=len(gap),
        max_logit=reference.abs().max().item(),
        max_logit_difference=gap.max().item(),
        sum_logit_difference=gap.mean(-1).sum().item(),
        sum_kl_divergence=(expected.exp() * (expected - found)).sum().item(),
        num_same_tokens=int((reference.argmax(-1) == other.argmax(-1)).sum()),
    )


def last_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """Logits [S, V] in fp32 at the last positions of the prompt, on the CPU."""
    return prompt_logits(model, prompt)[-MAX_POSITIONS:].cpu().contiguous()


def greedy_answers(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token, without regard to end tokens; empty for a classifier.

    All are answered in one batch, padded on the left, as every step of it reads all weights.
    """
    import torch
    from transformers import GenerationConfig

    if not model.can_generate():
        return [[] for _ in prompts]
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, decoder_start_token_id=start
    )
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        answers = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
    return answers[:, -NEW_TOKENS:].tolist()


def largest(values: Iterable[float]) -> float:
    """The largest value; not a number if any is none, which Python's `max` would overlook."""
    import torch

    return torch.tensor(list(values)).max().item()
