"""Base against tuned where every row has a class: accuracy, F1, and what is taken for what.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_ft.data.collate import Collator
from lora_ft.data.splits import Splits
from lora_ft.evaluation.bootstrap import ratio
from lora_ft.evaluation.compare import Comparison, Figure, Prediction, batches, compare_sums, evaluating, keep_finite
from lora_ft.sections import Recipe
from lora_ft.training.labelled import score_labels

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SplitScores:
    """The tuned model on one split."""

    accuracy: float
    """Share of rows whose class is the first choice."""
    num_rows: int
    """Rows of the split."""


@dataclass(frozen=True)
class Constant:
    """The tuned model against one that reads nothing: it knows how frequent each class is in training, and no more."""

    label: str
    """The commonest class of the training rows, which it always says."""
    loss: Figure
    """Of the classes' shares of the training rows, as `base`, and of the tuned model."""
    accuracy: Figure
    """Of always saying `label`, as `base`, and of the tuned model."""


@dataclass(frozen=True)
class Classification(Comparison):
    """Base and tuned on the test split; the base has a random head, and knows no class."""

    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers."""
    splits: dict[str, SplitScores] | None = None
    """The tuned model on every split that has rows."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Test rows of each class (down), by the class the tuned model chose (across); none where there is no test row."""
    constant: Constant | None = None
    """The tuned model against a constant answer; None where there is no test row."""


def compare_classes(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe
) -> Classification:
    """Figures of the model without and with its adapter on the test rows, and with it on all others."""
    labels, batch_size = splits.report.labels, recipe.evaluation.batch_size
    rows = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    with evaluating(model, adapter_on=True):
        tuned = {name: classify_rows(model, tokenizer, split, batch_size) for name, split in rows.items() if len(split)}
    wanted = {name: np.array(rows[name]["labels"][:]) for name in tuned}
    right = {name: count_right(logits, wanted[name]) for name, logits in tuned.items()}
    if "test" not in tuned:
        return Classification({}, 0, labels=tuple(labels), splits=right)
    with evaluating(model, adapter_on=False):
        base = classify_rows(model, tokenizer, splits.test, batch_size)
    scores = (score_classes(base, wanted["test"]), score_classes(tuned["test"], wanted["test"]))
    figures, notes = keep_finite(
        {
            "loss": compare_sums(scores, (0, 2), ratio, "nats", "lower"),
            "accuracy": compare_sums(scores, (1, 2), ratio, "share", "higher"),
            "f1": compare_sums(scores, range(3, scores[0].shape[1]), mean_f1, "share", "higher"),
        }
    )
    chosen = tuned["test"].argmax(-1)
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (wanted["test"], chosen.numpy()), 1)
    predictions = (
        Prediction(example.context, example.label or "", labels[before], labels[after])
        for example, before, after in zip(
            splits.examples("test"), base.argmax(-1).tolist(), chosen.tolist(), strict=True
        )
    )
    constant = compare_constant(wanted["train"], wanted["test"], scores[1], labels)
    return Classification(
        figures,
        len(chosen),
        tuple(predictions),
        notes=notes,
        labels=tuple(labels),
        splits=right,
        confusion=tuple(map(tuple, confusion.tolist())),
        constant=constant if constant.loss.is_finite else None,
    )


def compare_constant(taught: np.ndarray, wanted: np.ndarray, tuned: np.ndarray, labels: Sequence[str]) -> Constant:
    """What is to be had without reading a row: the classes of the training rows [M] say what to answer to the test
    rows [N], whose scores [N, 3 + 2C] the tuned model has.

    A class counts one row more than it has (rule of succession), so that one that was never taught costs no infinity.
    """
    import torch

    shares = torch.from_numpy(np.bincount(taught, minlength=len(labels)) + 1.0)
    scores = (score_classes((shares / shares.sum()).log().expand(len(wanted), -1), wanted), tuned)
    return Constant(
        labels[int(shares.argmax())],
        loss=compare_sums(scores, (0, 2), ratio, "nats", "lower"),
        accuracy=compare_sums(scores, (1, 2), ratio, "share", "higher"),
    )


def classify_rows(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, size: int) -> Tensor:
    """Logits [N, C] in fp32, on the CPU, in the order of the rows; `size` rows of like length share a batch."""
    import torch

    collate, ids = Collator(tokenizer.pad_token_id), rows["input_ids"][:]
    logits = torch.empty(len(ids), model.config.num_labels)
    for chosen in batches([len(row) for row in ids], size):
        batch = collate([{"input_ids": ids[index], "labels": 0} for index in chosen])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits[chosen] = model(**inputs).logits.float().cpu()
    return logits


def score_classes(logits: Tensor, wanted: np.ndarray) -> np.ndarray:
    """What each row adds to the figures [N, 3 + 2C]: loss in nats, whether it is right, 1; then twice the hits of each
    class, and how often it was wanted and chosen."""
    import torch

    classes = np.arange(logits.shape[1])
    is_wanted, is_chosen = wanted[:, None] == classes, logits.argmax(-1).numpy()[:, None] == classes
    losses = score_labels(logits, torch.from_numpy(wanted)).numpy()
    right = (is_wanted & is_chosen).any(1)
    columns = (losses[:, None], right[:, None], np.ones((len(wanted), 1)), 2 * (is_wanted & is_chosen))
    return np.concatenate([*columns, is_wanted.astype(int) + is_chosen], axis=1)


def mean_f1(sums: np.ndarray) -> float:
    """The mean of the classes' F1 from sums [2C], each class counting the same however rare it is.

    A class that was neither wanted nor chosen has none, and does not count.
    """
    hits, wanted_or_chosen = np.split(sums, 2)
    seen = wanted_or_chosen > 0
    return float(np.mean(hits[seen] / wanted_or_chosen[seen]))


def count_right(logits: Tensor, wanted: Sequence[int] | np.ndarray) -> SplitScores:
    """How often the likeliest class is the wanted one."""
    return SplitScores(float(np.mean(logits.argmax(-1).numpy() == wanted)), len(wanted))
