"""What training is steered by: the metric that a best checkpoint and an early end go by. No torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_ft.errors import Fault, raise_faults
from lora_ft.recipe import EARLY_STOPPING
from lora_ft.sections import Recipe

STEERING_METRICS = ("loss", "mean_token_accuracy")
"""What every evaluation during training measures, and what a best checkpoint can therefore be chosen by."""


def check_steering(recipe: Recipe) -> None:
    """Nothing, if every metric that steers training will be there at the first evaluation.

    Raises:
        UserError: a best checkpoint or early stopping by something that is not measured, or never.
    """
    raise_faults(_unmeasured(recipe))


def _unmeasured(recipe: Recipe) -> Iterator[Fault]:
    training, patience = recipe.training, recipe.training.get(EARLY_STOPPING)
    metric = training.get("metric_for_best_model")
    if metric is not None and str(metric).removeprefix("eval_") not in STEERING_METRICS:
        rule = f"Evaluations during training measure {' and '.join(STEERING_METRICS)}."
        yield Fault("training.metric_for_best_model", metric, rule, "Write loss, or leave it out.")
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
