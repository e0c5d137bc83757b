"""Which recipe keys a sweep varies, and within which bounds: `space.yaml`.

lora.r: [4, 8, 16, 32]                                   one of these
training.learning_rate: {low: 1e-5, high: 5e-3, log: true}
training.num_train_epochs: {low: 1, high: 6}             whole numbers between whole numbers
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.recipe import load_recipe
from lora_ft.yaml_lines import Document, read_yaml

BOUNDS = {"low", "high", "log", "step"}
UNSWEEPABLE = {
    "output_dir": "Each trial has a folder of its own.",
    "data": "Trials would be measured on different validation rows, or on different tokens of them.",
    "model.base": "Losses in nats a token of different vocabularies cannot be compared.",
    "model.revision": "Trials would be of different bases.",
}
"""Keys, or the sections of keys, by which trials could not be held against each other, with the reason."""
SWEEPABLE = ("data.packing",)
"""Keys of those sections that change training alone."""


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
        return self.options or (self.low, self.high)

    def suggest(self, trial: Any) -> Any:
        """A value for an Optuna trial, by its sampler."""
        if self.options:
            return self.labels[trial.suggest_categorical(self.key, list(self.labels))]
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, step=int(self.step or 1), log=self.log)
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
    return f"{key}={json.dumps(value)}"


def _find_faults(document: Document, key: str, value: Any) -> Iterator[Fault]:
    place, fix = document.place((key,)), "Write [8, 16], or {low: 1e-5, high: 1e-3, log: true}."
    reason = next((why for name, why in UNSWEEPABLE.items() if f"{key}.".startswith(f"{name}.")), None)
    if reason is not None and key not in SWEEPABLE:
        yield Fault(place, None, reason, "Remove it.")
    elif isinstance(value, list):
        if not value:
            yield Fault(place, None, "There is nothing to choose among.", fix)
    elif not isinstance(value, dict) or not {"low", "high"} <= set(value) <= BOUNDS:
        yield Fault(place, None, "A space is a list of values, or bounds: low, high, and log or step.", fix)
    elif not all(isinstance(value[name], (int, float)) for name in ("low", "high")) or value["low"] >= value["high"]:
        yield Fault(place, f"{value['low']} to {value['high']}", "low lies below high; both are numbers.", fix)
    elif value.get("log") and value["low"] <= 0:
        yield Fault(place, value["low"], "A logarithm needs numbers above 0.", fix)
    elif "step" in value and not (isinstance(value["step"], (int, float)) and value["step"] > 0):
        yield Fault(place, value["step"], "A step is a number above 0.", fix)
    elif value.get("log") and value.get("step"):
        yield Fault(place, value["step"], "Steps and logarithms exclude each other.", "Remove one.")


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
