"""Which recipe keys a sweep varies, and within which bounds: `space.yaml`.

lora.r: [4, 8, 16, 32]                                   one of these
training.learning_rate: {low: 1e-5, high: 5e-3, log: true}
training.num_train_epochs: {low: 1, high: 6}             whole numbers between whole numbers
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.recipe import load_recipe
from lora_ft.yaml_lines import Document, read_yaml

BOUNDS = {"low", "high", "log", "step"}
FIX = "Write [8, 16], or {low: 1e-5, high: 1e-3, log: true}."
UNSWEEPABLE = {
    "output_dir": "Each trial has a folder of its own.",
    "data": "Trials would be measured on different validation rows, or on different tokens of them.",
    "model.base": "Losses in nats a token of different vocabularies cannot be compared.",
    "model.revision": "Trials would be of different bases.",
    "evaluation": "It is about the test rows, which a trial never sees.",
    "export": "A trial leaves no adapter.",
    "guards.stall_minutes": "It changes no loss.",
    "training.early_stopping_patience": "The lowest loss of a trial counts then, whatever the patience.",
    "training.load_best_model_at_end": "The lowest loss of one trial would be held against the last of another.",
    "training.metric_for_best_model": "Trials are held against each other by their loss alone.",
    "training.save_*": "A trial saves nothing.",
    "training.logging_*": "It changes no loss.",
    "training.report_to": "It changes no loss.",
}
"""Keys, or sections of keys, that change nothing in a trial or by which trials could not be held against each other,
with the reason."""
SWEEPABLE = ("data.packing",)
"""Keys of those sections that change training alone."""
ROUNDING = 1 + 1e-9
"""How much larger a step may be than the way that it fills: 0.3 - 0.1 is less than 0.2."""


@dataclass(frozen=True)
class Axis:
    """One recipe key that is varied."""

    key: str
    """`section.key`."""
    options: tuple[Any, ...] = ()
    """The values to choose among; empty where there are bounds."""
    low: float = 0
    """Smallest value."""
    high: float = 0
    """Largest value."""
    log: bool = False
    """Whether values are drawn by their logarithm."""
    step: float | None = None
    """Distance between values; None for any."""

    @property
    def labels(self) -> dict[Any, Any]:
        """What the study calls each option: itself, or JSON where it is a list."""
        return {o if isinstance(o, (str, int, float, bool)) else json.dumps(o): o for o in self.options}

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that, if the recipe takes them, it takes all."""
        if self.options or self.step is None:
            return self.options or (self.low, self.high)
        return self.low, min(self.low + self.step, self.high), self.high

    def suggest(self, trial: Any) -> Any:
        """A value for an Optuna trial, by its sampler."""
        if self.options:
            return self.labels[trial.suggest_categorical(self.key, list(self.labels))]
        if all(isinstance(number, int) for number in (self.low, self.high, self.step or 1)):
            return trial.suggest_int(self.key, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)


def load_space(path: Path, recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[Axis, ...]:
    """The axes in a file, each tried on the recipe at its corners.

    Raises:
        UserError: bounds that are none, or a key or value that the recipe refuses.
    """
    document = read_yaml(path, str(path))
    raise_faults(document.faults)
    raise_faults(fault for key, value in document.values.items() for fault in _find_faults(document, key, value))
    axes = tuple(_read_axis(key, value) for key, value in document.values.items())
    raise_faults(fault for axis in axes for fault in _try_corners(document, axis, recipe, overrides))
    if not axes:
        raise UserError(str(path), None, "A space has at least one key.", "Write lora.r: [8, 16], say.")
    return axes


def as_override(key: str, value: Any) -> str:
    """`section.key=value`, as the command line takes it."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # YAML knows no escapes of two halves of a character


def _find_faults(document: Document, key: str, value: Any) -> Iterator[Fault]:
    place = document.place((key,))
    inside = next((name for name in UNSWEEPABLE if fnmatchcase(f"{key}.", f"{name}.*")), None)
    part = next((name for name in UNSWEEPABLE if name.startswith(f"{key}.")), None)
    if inside is not None and key not in SWEEPABLE:
        yield Fault(place, None, UNSWEEPABLE[inside], "Remove it.")
    elif part is not None:
        yield Fault(place, None, f"{part} is part of it. {UNSWEEPABLE[part]}", "Vary its other keys one by one.")
    elif not isinstance(value, list):
        yield from _find_bound_faults(place, value)
    elif not value:
        yield Fault(place, None, "There is nothing to choose among.", FIX)


def _find_bound_faults(place: str, value: Any) -> Iterator[Fault]:
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= BOUNDS:
        yield Fault(place, None, "A space is a list of values, or bounds: low, high, and log or step.", FIX)
    elif not isinstance(value.get("log", False), bool):
        yield Fault(place, value["log"], "log is true or false.", FIX)
    elif wrong := [name for name in ("low", "high", "step") if not _is_number(value.get(name, 1))]:
        yield Fault(place, value[wrong[0]], f"{wrong[0]} is a number.", FIX)
    elif value["low"] >= value["high"]:
        yield Fault(place, f"{value['low']} to {value['high']}", "low lies below high.", FIX)
    elif value.get("log") and value["low"] <= 0:
        yield Fault(place, value["low"], "A logarithm needs numbers above 0.", FIX)
    elif "step" in value and not 0 < value["step"] <= (value["high"] - value["low"]) * ROUNDING:
        yield Fault(place, value["step"], "A step is a number above 0, and at most the way from low to high.", FIX)
    elif value.get("log") and value.get("step"):
        yield Fault(place, value["step"], "Steps and logarithms exclude each other.", "Remove one.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _read_axis(key: str, value: Any) -> Axis:
    return Axis(key, options=tuple(value)) if isinstance(value, list) else Axis(key, **value)


def _try_corners(document: Document, axis: Axis, recipe: str | Path, overrides: Sequence[str]) -> Iterator[Fault]:
    """What the recipe says to the axis, with the place in the space's file."""
    for value in axis.corners:
        try:
            load_recipe(recipe, [*overrides, as_override(axis.key, value)])
        except UserError as error:
            for fault in error.faults:
                yield Fault(document.place((axis.key,)), fault.value, fault.rule, fault.fix)
            return


def describe_space(axes: Sequence[Axis]) -> list[Mapping[str, Any]]:
    """The axes as plain values, by which a study is known again."""
    return [vars(axis) for axis in axes]
