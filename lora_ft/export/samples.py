"""What a model answers to a few prompts, recorded so that a reload can be held against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_ft.export.manifest import Sample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOP_K = 8
RELATIVE_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Largest difference of a reloaded logit, as a share of the largest recorded one. A reload on the same machine is
exact; the slack is for other kernels, which round 16-bit products in another order."""


def record_samples(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[Sample, ...]:
    """The model's answer to each prompt of token ids, in evaluation mode; the model is left as it was."""
    with evaluation_mode(model):
        return tuple(record_sample(model, prompt) for prompt in prompts)


def record_sample(model: PreTrainedModel, prompt: Sequence[int]) -> Sample:
    """The likeliest continuations of one prompt, and how likely the prompt itself was."""
    import torch

    logits = prompt_logits(model, prompt)
    top = torch.topk(logits[-1], min(TOP_K, logits.shape[-1]))
    likelihood = None
    if logits.shape[0] == len(prompt) > 1:
        targets = torch.tensor(prompt[1:], device=logits.device)
        likelihood = -torch.nn.functional.cross_entropy(logits[:-1], targets).item()
    return Sample(tuple(prompt), tuple(top.indices.tolist()), tuple(top.values.tolist()), likelihood)


def prompt_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """Logits in fp32: [S, V] for a language model, [1, labels] for a classifier.

    An encoder-decoder model reads the prompt on both sides: any fixed function of all weights will do here.
    """
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits.float().reshape(-1, logits.shape[-1])


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def compare_samples(recorded: Sequence[Sample], found: Sequence[Sample]) -> float:
    """The largest difference of a logit, as a share of the largest recorded one.

    The recorded tokens are looked up among the found ones; one that fell out of the top is as far away as the
    smallest logit that stayed in it.
    """
    gaps = [gap for before, after in zip(recorded, found, strict=True) for gap in sample_gaps(before, after)]
    return max(math.inf if math.isnan(gap) else gap for gap in gaps)


def sample_gaps(before: Sample, after: Sample) -> list[float]:
    """How far each recorded number of one prompt has moved, as a share of the largest recorded logit."""
    logits = dict(zip(after.top_ids, after.top_logits, strict=True))
    recorded = zip(before.top_ids, before.top_logits, strict=True)
    pairs = [(logit, logits.get(token, min(after.top_logits))) for token, logit in recorded]
    if before.mean_log_probability is not None and after.mean_log_probability is not None:
        pairs.append((before.mean_log_probability, after.mean_log_probability))
    scale = max(1.0, *(abs(logit) for logit in before.top_logits))
    return [abs(one - other) / scale for one, other in pairs]
