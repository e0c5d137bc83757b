"""What training is steered by: the metric that a best checkpoint and an early end go by. No torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_ft.errors import Fault
from lora_ft.recipe import EARLY_STOPPING
from lora_ft.sections import Recipe, Task

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
