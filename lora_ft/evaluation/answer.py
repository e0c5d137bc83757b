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
    Answer,
    Comparison,
    Limit,
    Prediction,
    batches,
    evaluating,
    limit_answer,
    pair_answers,
    score_pair,
    sum_up,
)
from lora_ft.model.profile import count_positions
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
    return sum_up(predictions, scores, section)


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
    if not count:
        return
    texts = tokenizer.batch_decode(questions, skip_special_tokens=True)
    references = [examples[index].reference for index in range(count)]
    expected = tokenizer(text_target=references, add_special_tokens=False)["input_ids"]
    longer = [len(ids) > section.max_new_tokens for ids in expected]
    yield from pair_answers(texts, references, answers, longer)


def write_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[list[int]], section: EvaluationSection
) -> list[Answer]:
    """The answer to each question of token ids, in the order of the questions; those of like length share a batch."""
    import torch

    limit = limit_answer(section.max_new_tokens, count_positions(model), 1)
    cut_by: Limit = "max_new_tokens" if limit == section.max_new_tokens else "positions"
    config, answers = model.generation_config, [Answer("")] * len(questions)
    stops = torch.tensor([] if config.eos_token_id is None else config.eos_token_id, dtype=torch.long)
    told = limit if config.forced_eos_token_id is None else limit - 1  # BART ends what is cut as if it had said all
    for chosen in batches([len(question) for question in questions], section.batch_size):
        ids = pad([questions[index] for index in chosen], tokenizer.pad_token_id)
        mask = pad([[1] * len(questions[index]) for index in chosen], 0)
        with torch.no_grad():
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=limit,
            )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = torch.isin(written[:, 1 : told + 1].cpu(), stops).any(1).tolist()  # the first only starts the decoder
        for index, text, is_ended in zip(chosen, texts, ended, strict=True):
            answers[index] = Answer(text.strip(), None if is_ended else cut_by)
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
