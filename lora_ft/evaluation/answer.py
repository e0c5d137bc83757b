"""Base against tuned where an encoder reads the question and a decoder writes the answer.

Shapes: N rows, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_ft.data.collate import Collator, pad
from lora_ft.data.render import IGNORE_INDEX
from lora_ft.data.splits import Splits
from lora_ft.evaluation.compare import (
    Comparison,
    Prediction,
    batches,
    compare_tokens,
    evaluating,
    score_answers,
    score_pair,
)
from lora_ft.sections import EvaluationSection, Recipe
from lora_ft.training.labelled import answer_inputs, score_labels

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def compare_answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe) -> Comparison:
    """Figures of the model without and with its adapter on the same rows.

    Answers are written as the base's generation config says: by default with 4 beams, and no bigram twice.
    """
    if not len(splits.test):
        return Comparison({}, 0)
    section = recipe.evaluation
    predictions = tuple(answer_rows(model, tokenizer, splits, section))
    scores = score_pair(model, lambda: score_rows(model, tokenizer, splits.test, section.batch_size))
    figures = compare_tokens(scores) | score_answers(predictions, section.metrics)
    return Comparison(figures, int(scores[0][:, 2].sum()), predictions)


def answer_rows(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, splits: Splits, section: EvaluationSection
) -> Iterator[Prediction]:
    """The first `section.generate` test rows, answered by both models."""
    examples = splits.examples("test")
    count = len(examples) if section.generate == "all" else min(section.generate, len(examples))
    questions = splits.test["input_ids"][:count]
    answers = []
    for adapter_on in (False, True):
        with evaluating(model, adapter_on):
            answers.append(write_answers(model, tokenizer, questions, section))
    texts = tokenizer.batch_decode(questions, skip_special_tokens=True) if count else []
    references = [examples[index].reference for index in range(count)]
    yield from (Prediction(*row) for row in zip(texts, references, *answers, strict=True))


def write_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[list[int]], section: EvaluationSection
) -> list[str]:
    """The answer to each question of token ids, in the order of the questions; those of like length share a batch."""
    import torch

    answers = [""] * len(questions)
    for chosen in batches([len(question) for question in questions], section.batch_size):
        ids = pad([questions[index] for index in chosen], tokenizer.pad_token_id)
        mask = pad([[1] * len(questions[index]) for index in chosen], 0)
        with torch.no_grad():
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=section.max_new_tokens,
            )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers


def score_rows(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, size: int) -> np.ndarray:
    """Loss in nats, tokens that were the first choice, and tokens of each row's answer [N, 3]."""
    import torch

    collate, sums = Collator(tokenizer.pad_token_id), np.empty((len(rows), 3))
    for chosen in batches([len(ids) for ids in rows["input_ids"][:]], size):
        batch = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in chosen]).items()}
        with torch.no_grad():
            logits, labels = model(**answer_inputs(model, batch)).logits, batch["labels"]
        columns = (score_labels(logits, labels), logits.argmax(-1) == labels, labels != IGNORE_INDEX)
        sums[chosen] = np.stack([column.double().sum(1).cpu().numpy() for column in columns], axis=1)
    return sums
