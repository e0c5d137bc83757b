"""Base against tuned, on rows nobody trained on: loss over the answers' tokens, and answers written out.

Shapes: N rows, B rows of a batch, S positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_ft.data.collate import Collator
from lora_ft.data.example import Example
from lora_ft.data.render import Renderer
from lora_ft.data.store import chunked
from lora_ft.evaluation.bootstrap import Estimate, Finish, estimate_pair, ratio
from lora_ft.evaluation.metrics import find_metric
from lora_ft.sections import DataSection, EvaluationSection
from lora_ft.training.loss import add_scoring
from lora_ft.training.meter import sum_rows

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

WINDOW_BATCHES = 16
"""Batches that are read at once and sorted by length; memory does not grow with the rows beyond them."""


@dataclass(frozen=True)
class Figure:
    """One thing measured of both models on the same rows."""

    base: Estimate
    """Without the adapter."""
    tuned: Estimate
    """With it."""
    difference: Estimate
    """Tuned less base; an interval without 0 means that it is no accident of these rows."""
    unit: Literal["share", "nats", "number"]
    """How it reads: as a percentage, in nats a token, or as it is."""
    better: Literal["higher", "lower"]
    """Which way is better."""
    num_rows: int
    """Rows it was measured on."""


@dataclass(frozen=True)
class Prediction:
    """One test row, answered twice."""

    prompt: str
    """What both models saw, special tokens and all."""
    reference: str
    """The answer in the data, as the model was taught to say it; special tokens removed."""
    base: str
    """The base's answer."""
    tuned: str
    """The tuned model's answer."""


@dataclass(frozen=True)
class Comparison:
    """Base and tuned on the test split. A task adds figures of its own by name; reports show what is there."""

    figures: dict[str, Figure]
    """loss, perplexity and token_accuracy over supervised tokens, then the metrics, by name."""
    num_supervised_tokens: int
    """Tokens that the first three are means over."""
    predictions: tuple[Prediction, ...] = ()
    """The rows that were answered, in order; none where no row asks anything."""
    general: Figure | None = None
    """Loss on text that has nothing to do with the task: what was forgotten."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values but the predictions, which go to a file of their own."""
        plain = asdict(self)
        return {name: value for name, value in plain.items() if name != "predictions"}


def compare_models(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    examples: Sequence[Example],
    data: DataSection,
    section: EvaluationSection,
    general: datasets.Dataset | None = None,
) -> Comparison:
    """Figures of the model without and with its adapter on the same rows.

    `rows` are the tokenised test rows (`input_ids`, `labels`), `examples` the same rows before rendering, `general`
    tokenised rows of other text. Sums are kept row by row, so neither the batch size nor the batches' order matters.
    """
    if not len(rows):
        return Comparison({}, 0)
    predictions = tuple(answer_rows(model, tokenizer, examples, data, section))
    scores = score_pair(model, lambda: score_rows(model, tokenizer, rows, section.batch_size))
    forgotten = None
    if general is not None and len(general):
        general_scores = score_pair(model, lambda: score_rows(model, tokenizer, general, section.batch_size))
        forgotten = compare_sums(general_scores, (0, 2), ratio, "nats", "lower")
    figures = compare_tokens(scores) | score_answers(predictions, section.metrics)
    return Comparison(figures, int(scores[0][:, 2].sum()), predictions, forgotten)


def compare_tokens(scores: tuple[np.ndarray, np.ndarray]) -> dict[str, Figure]:
    """The figures over tokens, of both models' rows [N, 3]: loss in nats, tokens that were the first choice, tokens."""
    return {
        "loss": compare_sums(scores, (0, 2), ratio, "nats", "lower"),
        "perplexity": compare_sums(scores, (0, 2), perplexity, "number", "lower"),
        "token_accuracy": compare_sums(scores, (1, 2), ratio, "share", "higher"),
    }


def score_answers(predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, Figure]:
    """Each metric over the answers of both models; empty where there are none."""
    figures: dict[str, Figure] = {}
    references = [prediction.reference for prediction in predictions]
    for name in names if predictions else ():
        metric = find_metric(name)
        base = metric.measure([prediction.base for prediction in predictions], references)
        tuned = metric.measure([prediction.tuned for prediction in predictions], references)
        paired = estimate_pair(base, tuned, metric.finish)
        label = name.rpartition("/")[2]
        figures[label] = Figure(paired.base, paired.tuned, paired.difference, metric.unit, "higher", len(predictions))
    return figures


def compare_sums(
    scores: tuple[np.ndarray, np.ndarray],
    columns: Sequence[int],
    finish: Finish,
    unit: Literal["share", "nats", "number"],
    better: Literal["higher", "lower"],
) -> Figure:
    """The figure that `finish` makes of some columns of both models' rows [N, k]."""
    base, tuned = (sums[:, columns] for sums in scores)
    paired = estimate_pair(base, tuned, finish)
    return Figure(paired.base, paired.tuned, paired.difference, unit, better, len(base))


def answer_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    data: DataSection,
    section: EvaluationSection,
) -> Iterator[Prediction]:
    """The first `section.generate` rows that ask something, answered by both models, a window of batches at a time.

    A reference is what the row teaches the model to say after the prompt, which may be more than the answer's text.
    """
    renderer, count = Renderer(tokenizer, data), None if section.generate == "all" else section.generate
    asked = islice(filter(None, map(renderer.render_exchange, examples)), count)
    for exchanges in chunked(asked, section.batch_size * WINDOW_BATCHES):
        prompts, expected = map(list, zip(*exchanges, strict=True))
        answers = []
        for adapter_on in (False, True):
            with evaluating(model, adapter_on):
                answers.append(generate_answers(model, tokenizer, prompts, renderer.stop_token_ids, section))
        references = [text.strip() for text in tokenizer.batch_decode(expected, skip_special_tokens=True)]
        texts = tokenizer.batch_decode(prompts)
        yield from (Prediction(*row) for row in zip(texts, references, *answers, strict=True))


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

    answers = [""] * len(prompts)
    for chosen in batches([len(prompt) for prompt in prompts], section.batch_size):
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
def evaluating(model: PeftModel, adapter_on: bool) -> Iterator[None]:
    """Evaluation mode, with or without the adapter, and everything as it was afterwards."""
    was_training, model_cache, text = model.training, model.config.use_cache, model.config.get_text_config()
    routes = getattr(text, "output_router_logits", False)  # TRL turns it on for experts; `generate` cannot do with it
    model.eval()
    model.config.use_cache = True
    if routes:
        text.output_router_logits = False
    try:
        with contextlib.nullcontext() if adapter_on else model.disable_adapter():
            yield
    finally:
        model.config.use_cache = model_cache
        if routes:
            text.output_router_logits = True
        model.train(was_training)


def score_pair(model: PeftModel, score: Callable[[], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What `score` makes of the model as the base, and tuned."""
    scores = []
    for adapter_on in (False, True):
        with evaluating(model, adapter_on):
            scores.append(score())
    return scores[0], scores[1]


def score_rows(model: Any, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, batch_size: int) -> np.ndarray:
    """Loss in nats, tokens that were the first choice, and supervised tokens of each row [N, 3]: 24 bytes a row."""
    import torch

    add_scoring(model)
    collate, window = Collator(tokenizer.pad_token_id), batch_size * WINDOW_BATCHES
    sums = np.empty((len(rows), 3))
    for start in range(0, len(rows), window):
        read = [rows[index] for index in range(start, min(start + window, len(rows)))]
        for chosen in batches([len(row["input_ids"]) for row in read], batch_size):
            batch = collate([read[index] for index in chosen])
            with torch.no_grad():
                scored = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, score=True)
            row_sums = sum_rows(scored, len(chosen)).double().cpu().numpy()
            sums[start + np.array(chosen)] = row_sums[:, :3]
    return sums


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[start : start + size] for start in range(0, len(order), size))


def perplexity(sums: np.ndarray) -> float:
    """exp of the loss: the sum of losses over the number of tokens."""
    return math.exp(min(ratio(sums), 700.0))
