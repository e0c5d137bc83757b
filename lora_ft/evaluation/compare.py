"""Base against tuned, on rows nobody trained on: loss over the answers' tokens, and answers written out.

Shapes: N rows, B rows of a batch, S positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lora_ft.data.collate import Collator
from lora_ft.data.example import Example
from lora_ft.data.render import Renderer
from lora_ft.data.store import chunked
from lora_ft.errors import UserError
from lora_ft.evaluation.bootstrap import Estimate, Finish, estimate_pair, ratio
from lora_ft.evaluation.metrics import find_metric
from lora_ft.model.profile import count_positions
from lora_ft.sections import DataSection, EvaluationSection
from lora_ft.training.loss import add_scoring
from lora_ft.training.meter import sum_rows

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

WINDOW_BATCHES = 16
"""Batches that are read at once and sorted by length; memory does not grow with the rows beyond them."""
Limit = Literal["max_new_tokens", "positions"]
"""What can end an answer before the model does: the recipe, or a base that learned no more positions."""


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

    @property
    def is_finite(self) -> bool:
        """Whether its values and intervals are numbers that JSON knows."""
        estimates = (self.base, self.tuned, self.difference)
        return all(math.isfinite(number) for each in estimates for number in (each.value, each.low, each.high))


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
    cut_by: Limit | None = None
    """What ended the tuned model's answer; None where it did so itself."""
    is_reference_longer: bool = False
    """Whether the reference has more tokens than max_new_tokens."""


class Answer(NamedTuple):
    """What a model wrote."""

    text: str
    """Without special tokens."""
    cut_by: Limit | None = None
    """What ended it; None where the model did so itself."""


@dataclass(frozen=True)
class Generation:
    """How far the tuned model came with its answers."""

    max_new_tokens: int
    """Tokens that it could write."""
    num_answers: int
    """Rows that were answered."""
    num_cut: int
    """Answers that were ended by max_new_tokens."""
    num_out_of_positions: int
    """Answers that ended where the positions did that the base learned."""
    num_long_references: int
    """References of more tokens than max_new_tokens."""

    def describe(self) -> Iterator[str]:
        """A sentence for each limit that was met."""
        limit, raised = f"max_new_tokens ({self.max_new_tokens})", "raise evaluation.max_new_tokens."
        if self.num_cut:
            longer = self.num_long_references
            references = f"{longer} reference{'s are' if longer > 1 else ' is'}" if longer else "no reference is"
            advice = f", and {references} longer: {raised}" if longer else f", though {references} longer."
            yield f"{self.num_cut} of {self.num_answers} answers were cut at {limit}{advice}"
        elif self.num_long_references:
            yield f"{self.num_long_references} of {self.num_answers} references are longer than {limit}: {raised}"
        if self.num_out_of_positions:
            yield (
                f"{self.num_out_of_positions} of {self.num_answers} answers were cut where the base's learned positions"
                " end: give shorter prompts, or take a base with more positions."
            )


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
    generation: Generation | None = None
    """How far the answers came; None where there are none."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know, a sentence each: answers that were cut, figures that were left out."""

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
    return sum_up(predictions, scores, section, forgotten)


def sum_up(
    predictions: tuple[Prediction, ...],
    scores: tuple[np.ndarray, np.ndarray],
    section: EvaluationSection,
    general: Figure | None = None,
) -> Comparison:
    """All figures of what both models wrote, and of their rows [N, 3] as `compare_tokens` takes them.

    Those that are no finite numbers are left out, with a note.
    """
    own, failures = score_answers(predictions, section.metrics)
    figures, notes = keep_finite(compare_tokens(scores) | own)
    forgotten, more = keep_finite({"loss on general text": general} if general else {})
    generation = count_cuts(predictions, section.max_new_tokens) if predictions else None
    cuts = generation.describe() if generation else ()
    notes = (*cuts, *failures, *notes, *more)
    general = next(iter(forgotten.values()), None)
    return Comparison(figures, int(scores[0][:, 2].sum()), predictions, general, generation, notes)


def keep_finite(figures: Mapping[str, Figure]) -> tuple[dict[str, Figure], tuple[str, ...]]:
    """The figures that are finite numbers, and a note for each that is left out."""
    finite = {name: figure for name, figure in figures.items() if figure.is_finite}
    return finite, tuple(f"{name} is left out: it is no finite number." for name in figures if name not in finite)


def count_cuts(predictions: Sequence[Prediction], max_new_tokens: int) -> Generation:
    """How many answers of the tuned model a limit ended."""
    cuts = [prediction.cut_by for prediction in predictions]
    num_long = sum(prediction.is_reference_longer for prediction in predictions)
    return Generation(max_new_tokens, len(cuts), cuts.count("max_new_tokens"), cuts.count("positions"), num_long)


def compare_tokens(scores: tuple[np.ndarray, np.ndarray]) -> dict[str, Figure]:
    """The figures over tokens, of both models' rows [N, 3]: loss in nats, tokens that were the first choice, tokens."""
    return {
        "loss": compare_sums(scores, (0, 2), ratio, "nats", "lower"),
        "perplexity": compare_sums(scores, (0, 2), perplexity, "number", "lower"),
        "token_accuracy": compare_sums(scores, (1, 2), ratio, "share", "higher"),
    }


def score_answers(predictions: Sequence[Prediction], names: Sequence[str]) -> tuple[dict[str, Figure], list[str]]:
    """Each metric over the answers of both models, none where there are none; and a note for each that fails."""
    figures: dict[str, Figure] = {}
    notes = []
    short = [name.rpartition("/")[2] for name in names]
    references = [prediction.reference for prediction in predictions]
    for name, own in zip(names, short, strict=True) if predictions else ():
        label = name if short.count(own) > 1 else own
        try:
            metric = find_metric(name)
            base = metric.measure([prediction.base for prediction in predictions], references)
            tuned = metric.measure([prediction.tuned for prediction in predictions], references)
        except UserError as error:  # a user's function, after all that was trained
            (fault,) = error.faults
            notes.append(f"{label} is left out ({fault.place}): {fault.rule}")
            continue
        paired = estimate_pair(base, tuned, metric.finish)
        figures[label] = Figure(paired.base, paired.tuned, paired.difference, metric.unit, "higher", len(predictions))
    return figures, notes


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
        stops = set(renderer.stop_token_ids)
        longer = [sum(token not in stops for token in ids) > section.max_new_tokens for ids in expected]
        yield from pair_answers(texts, references, answers, longer)


def pair_answers(
    prompts: Sequence[str], references: Sequence[str], answers: Sequence[Sequence[Answer]], longer: Sequence[bool]
) -> Iterator[Prediction]:
    """Rows with the answers of the base and of the tuned model; `longer` says which references cannot be written."""
    for prompt, reference, base, tuned, is_longer in zip(prompts, references, *answers, longer, strict=True):
        yield Prediction(prompt, reference, base.text, tuned.text, tuned.cut_by, is_longer)


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stop_token_ids: Sequence[int],
    section: EvaluationSection,
) -> list[Answer]:
    """The greedy answer to each prompt of token ids, in the order of the prompts.

    Prompts of like length share a batch, padded on the left, so that every answer starts right after its prompt. Those
    near the end of learned positions share one only with prompts of their length, or it would cut their neighbours.
    """
    import torch

    positions, stops = count_positions(model), torch.tensor(stop_token_ids, dtype=torch.long)
    lengths, answers = [len(prompt) for prompt in prompts], [Answer("", "positions")] * len(prompts)
    limits = [limit_answer(section.max_new_tokens, positions, length) for length in lengths]
    alike = (groupby(chosen, limits.__getitem__) for chosen in batches(lengths, section.batch_size))
    for limit, chosen in ((limit, list(group)) for limit, group in chain.from_iterable(alike) if limit > 0):
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
                max_new_tokens=limit,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list(stop_token_ids),
            )
        said = written[:, width:].cpu()
        cut_by: Limit = "max_new_tokens" if limit == section.max_new_tokens else "positions"
        texts, ended = tokenizer.batch_decode(said, skip_special_tokens=True), torch.isin(said, stops).any(1).tolist()
        for index, text, is_ended in zip(chosen, texts, ended, strict=True):
            answers[index] = Answer(text.strip(), None if is_ended else cut_by)
    return answers


def limit_answer(max_new_tokens: int, positions: int | None, width: int) -> int:
    """New tokens that may follow `width` tokens: those asked for, or what learned positions leave, which may be none.

    The last token is read by nobody, and needs no position.
    """
    return max_new_tokens if positions is None else min(max_new_tokens, positions + 1 - width)


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
    """Loss in nats, tokens that were the first choice, and supervised tokens of each row [N, 3]: 24 bytes a row.

    Where the base learned positions, a row is read as far as they go.
    """
    import torch

    add_scoring(model)
    collate, window = Collator(tokenizer.pad_token_id), batch_size * WINDOW_BATCHES
    sums, fitting = np.empty((len(rows), 3)), slice(count_positions(model))
    for start in range(0, len(rows), window):
        whole = (rows[index] for index in range(start, min(start + window, len(rows))))
        read = [{name: row[name][fitting] for name in ("input_ids", "labels")} for row in whole]
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
