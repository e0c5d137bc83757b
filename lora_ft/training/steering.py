"""What training is steered by: the metric that a best checkpoint and an early end go by. No torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_ft.errors import Fault
from lora_ft.recipe_rules import EARLY_STOPPING
from lora_ft.sections import Recipe, Task

if TYPE_CHECKING:
    from transformers import TrainingArguments

STEERING_METRICS: dict[Task, tuple[str, ...]] = {
    "sft": ("loss", "mean_token_accuracy"),
    "classification": ("loss", "accuracy"),
    "seq2seq": ("loss", "mean_token_accuracy"),
}
"""`data.task` → what every evaluation during training measures, and what a best checkpoint can be chosen by."""


def check_steering(recipe: Recipe) -> Iterator[Fault]:
    """A fault for each best checkpoint or early end by a metric that evaluations do not give, or never."""
    training, patience = recipe.training, recipe.training.get(EARLY_STOPPING)
    metric = training.get("metric_for_best_model")
    measured = STEERING_METRICS[recipe.data.task]
    if metric is not None and str(metric).removeprefix("eval_") not in measured:
        rule = f"Evaluations during training measure {' and '.join(measured)}."
        yield Fault("training.metric_for_best_model", metric, rule, "Write one of these, or leave it out.")
    if patience is not None and metric is None and not training.get("load_best_model_at_end"):
        rule = "Without training.metric_for_best_model nothing says which evaluation is better."
        yield Fault(f"training.{EARLY_STOPPING}", patience, rule, "Write training.metric_for_best_model: loss.")
    if training.get("eval_strategy", "no") != "no":
        return
    fix = "Write training.eval_strategy: epoch, and keep validation rows (data.split.validation)."
    for key, value in (
        (f"training.{EARLY_STOPPING}", patience),
        ("training.load_best_model_at_end", training.get("load_best_model_at_end") or None),
        ("training.metric_for_best_model", metric),
    ):
        if value is not None:
            yield Fault(key, value, "It needs evaluations during training, and there are none.", fix)


def check_reach(arguments: TrainingArguments, num_rows: int) -> Iterator[Fault]:
    """A fault where a best checkpoint is to be chosen and `eval_delay` lasts longer than training on so many rows.

    The last step is evaluated in any case. Steps and epochs are counted as transformers does, by batches.
    """
    strategy, delay = arguments.eval_strategy, arguments.eval_delay or 0
    if not arguments.load_best_model_at_end or strategy == "no":
        return
    batches = num_rows / (arguments.per_device_train_batch_size * arguments.world_size)
    batches = max(1, math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches))
    accumulation = arguments.gradient_accumulation_steps
    steps_an_epoch = math.ceil(batches / accumulation)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_an_epoch)
    epochs, rest = divmod(steps, steps_an_epoch)
    end = epochs + min(rest * accumulation, batches) / batches if strategy == "epoch" else steps
    if delay > end:
        unit = "epoch" if strategy == "epoch" else "step"
        rule = f"Training ends with {unit} {end:g}, before anything was evaluated: nothing is best then."
        yield Fault("training.eval_delay", delay, rule, "Write a smaller number, or leave it out.")


def is_out_of_patience(history: Sequence[Mapping[str, Any]], metric: str, greater: bool, patience: int) -> bool:
    """Whether the last `patience` evaluations in a trainer's log were no better than the best one before them.

    The log is part of every checkpoint, so a resumed run ends where the uninterrupted one does.
    """
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[name] if greater else -entry[name] for entry in history if name in entry]
    return bool(values) and len(values) - 1 - values.index(max(values)) >= patience


def rank_steps(history: Sequence[Mapping[str, Any]], metric: str, greater: bool) -> list[int]:
    """The steps that a trainer's log has evaluations of, the best first; of equals, the earlier one."""
    name = f"eval_{metric.removeprefix('eval_')}"
    values = {int(entry["step"]): entry[name] for entry in history if name in entry}
    return sorted(values, key=lambda step: -values[step] if greater else values[step])
