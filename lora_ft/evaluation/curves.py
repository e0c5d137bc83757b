"""What a run logged, as curves over its steps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError

TURNED_BY, TURNED_BY_NATS = 0.02, 0.005
"""Validation has turned where it ends this much above its lowest, as a share of it and in nats: less is noise."""
LOG = "log.jsonl"


@dataclass(frozen=True)
class Point:
    """A loss at a step."""

    step: int
    """Optimizer steps so far."""
    epoch: float
    """Passes over the training rows so far."""
    loss: float
    """Mean over supervised tokens, in nats."""


@dataclass(frozen=True)
class Curves:
    """How the losses went."""

    train: tuple[Point, ...] = ()
    """Loss of the rows trained on since the point before."""
    validation: tuple[Point, ...] = ()
    """Loss of the validation split; at step 0 that of the base."""

    @property
    def lowest(self) -> Point | None:
        """Where validation was lowest."""
        return min(self.validation, key=lambda point: point.loss, default=None)

    @property
    def turning(self) -> Point | None:
        """Where validation was lowest, if it ended clearly above; None where it never turned."""
        return self.turning_before(self.validation[-1]) if self.validation else None

    def turning_before(self, point: Point) -> Point | None:
        """Where validation was lowest, if that lies before a point of it that is clearly above."""
        lowest = self.lowest
        if lowest is None or lowest.step >= point.step:
            return None
        return lowest if point.loss - lowest.loss > validation_noise(lowest.loss) else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def validation_noise(loss: float) -> float:
    """How far a validation loss of so many nats moves without meaning anything, in nats."""
    return max(TURNED_BY * loss, TURNED_BY_NATS)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that is being written is left for later, and none where there is no log yet.

    Raises:
        UserError: a line is damaged.
    """
    try:
        text = (run / LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    return [_read_line(line, f"{run / LOG}:{number}") for number, line in enumerate(lines, start=1)]


def _read_line(text: str, place: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or "step" not in line:
        rule = "A line of the log is a JSON object with a step."
        raise UserError(place, text[:60], rule, "Take the line out.")
    return line


def trace_curves(lines: Iterable[dict[str, Any]]) -> Curves:
    """The curves of logged lines. Where a resumed run took steps again, the later line counts."""
    found: dict[str, dict[int, Point]] = {"loss": {}, "eval_loss": {}}
    for line in lines:
        for name, points in found.items():
            if name in line:
                points[line["step"]] = Point(line["step"], line.get("epoch") or 0.0, line[name])
    train, validation = (tuple(points[step] for step in sorted(points)) for points in found.values())
    return Curves(train, validation)
