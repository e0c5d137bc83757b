"""What a run does differently for each `data.task`: one line a task.

Which class reads the base, and what PEFT calls the task, stands in `model.load.AUTO_CLASSES` and
`model.adapter.TASK_TYPES`; what a row becomes, in `data.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ft.data.splits import Splits
from lora_ft.evaluation.answer import compare_answers
from lora_ft.evaluation.classify import compare_classes
from lora_ft.evaluation.compare import Comparison, compare_models
from lora_ft.evaluation.general import prepare_general
from lora_ft.fingerprint import BaseIdentity
from lora_ft.model.load import load_base
from lora_ft.sections import Recipe, Task
from lora_ft.training.labelled import (
    build_answer_arguments,
    build_answer_trainer,
    build_class_arguments,
    build_class_trainer,
)
from lora_ft.training.trainer import build_arguments, build_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskSteps:
    """The steps of a run that a task has its own way of."""

    build_arguments: Callable[..., Any]
    """(training section, output folder) → the trainer's arguments."""
    build_trainer: Callable[..., Any]
    """(model, tokenizer, train rows, validation rows, arguments) → the trainer."""
    compare: Callable[[Any, Any, Splits, Recipe], Comparison]
    """(model, tokenizer, splits, recipe) → base against tuned on the test split, as `write_report` takes it."""


def compare_texts(model: Any, tokenizer: Any, splits: Splits, recipe: Recipe) -> Comparison:
    """Base against tuned where text goes on."""
    general = prepare_general(recipe.evaluation, recipe.data, tokenizer)
    examples = splits.examples("test")
    return compare_models(model, tokenizer, splits.test, examples, recipe.data, recipe.evaluation, general)


TASKS: dict[Task, TaskSteps] = {
    "sft": TaskSteps(build_arguments, build_trainer, compare_texts),
    "classification": TaskSteps(build_class_arguments, build_class_trainer, compare_classes),
    "seq2seq": TaskSteps(build_answer_arguments, build_answer_trainer, compare_answers),
}


def read_base(
    recipe: Recipe, base: BaseIdentity, tokenizer: PreTrainedTokenizerBase, splits: Splits
) -> PreTrainedModel:
    """The base as the model of the recipe's task, with a head for the classes of the data where it is to tell them."""
    task, labels = recipe.data.task, splits.report.labels
    return load_base(
        base, recipe.model, recipe.quantization, task=task, labels=labels, pad_token_id=tokenizer.pad_token_id
    )
