"""Base against tuned, on rows nobody trained on: loss over the answers' tokens, and answers written out.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_ft.data.collate import Collator
from lora_ft.data.example import Example
from lora_ft.data.render import Renderer
from lora_ft.evaluation.metrics import score_answers
from lora_ft.sections import DataSection, EvaluationSection
from lora_ft.training.loss import score_batch

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """One model on one split."""

    loss: float
    """Mean negative log-likelihood of a supervised token, in nats."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of supervised tokens that are the model's first choice."""
    num_supervised_tokens: int
    """Tokens the three figures above are means over."""
    metrics: dict[str, float]
    """Means over the generated answers, by name."""
    num_answers: int
    """Answers the metrics are means over."""


@dataclass(frozen=True)
class Prediction:
    """One test row, answered twice."""

    prompt: str
    """What both models saw, special tokens and all."""
    reference: str
    """The answer in the data."""
    base: str
    """The base's answer."""
    tuned: str
    """The tuned model's answer."""


@dataclass(frozen=True)
class Comparison:
    """Base and tuned on the test split."""

    base: Scores
    """Without the adapter."""
    tuned: Scores
    """With it."""
    predictions: tuple[Prediction, ...]
    """The rows that were answered, in order."""

    def to_json(self) -> dict[str, Any]:
        """Both scores as plain values; the predictions go to a file of their own."""
        return {"base": asdict(self.base), "tuned": asdict(self.tuned)}


def compare_models(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    examples: Sequence[Example],
    data: DataSection,
    section: EvaluationSection,
) -> Comparison:
    """Scores of the model without and with its adapter on the same rows.

    `rows` are the tokenised test rows (`input_ids`, `labels`), `examples` the same rows before rendering.
    """
    count = len(examples) if section.generate == "all" else min(section.generate, len(examples))
    asked = examples[:count]
    renderer = Renderer(tokenizer, data)
    prompts = [renderer.render_prompt(example) for example in asked]
    references = [example.reference for example in asked]
    scores, answers = [], []
    for adapter_on in (False, True):
        with _evaluating(model, adapter_on):
            written = generate_answers(model, tokenizer, prompts, renderer.stop_token_ids, section)
            scores.append(_score(model, tokenizer, rows, written, references, section))
            answers.append(written)
    texts = tokenizer.batch_decode(prompts) if prompts else []
    predictions = tuple(Prediction(*row) for row in zip(texts, references, *answers, strict=True))
    return Comparison(scores[0], scores[1], predictions)


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stop_token_ids: Sequence[int],
    section: EvaluationSection,
) -> list[str]:
    """The greedy answer to each prompt of token ids, special tokens removed, in the order of the prompts.

    Prompts of like length share a batch, padded on the left, so that every answer starts right after its prompt.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), section.batch_size):
        chosen = order[start : start + section.batch_size]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with torch.no_grad():
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=section.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list(stop_token_ids),
            )
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers


@contextlib.contextmanager
def _evaluating(model: PeftModel, adapter_on: bool) -> Iterator[None]:
    """Evaluation mode, with or without the adapter, and everything as it was afterwards."""
    was_training, model_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with contextlib.nullcontext() if adapter_on else model.disable_adapter():
            yield
    finally:
        model.config.use_cache = model_cache
        model.train(was_training)


def _score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    answers: Sequence[str],
    references: Sequence[str],
    section: EvaluationSection,
) -> Scores:
    """Sums over all supervised tokens of all rows, divided once: the batch size does not matter."""
    import torch

    collate = Collator(tokenizer.pad_token_id)
    loss_sum, num_correct, num_tokens = 0.0, 0, 0
    for start in range(0, len(rows), section.batch_size):
        batch = collate([rows[index] for index in range(start, min(start + section.batch_size, len(rows)))])
        with torch.no_grad():
            scored = score_batch(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        loss_sum += scored.loss_sum
        num_correct += scored.num_correct
        num_tokens += scored.num_tokens
    loss = loss_sum / num_tokens if num_tokens else math.nan
    metrics = score_answers(answers, references, section.metrics)
    accuracy = num_correct / num_tokens if num_tokens else math.nan
    return Scores(loss, math.exp(min(loss, 700.0)), accuracy, num_tokens, metrics, len(answers))
