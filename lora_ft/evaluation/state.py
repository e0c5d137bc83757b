"""How far a run is, by its log: what a page or a terminal shows while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunState:
    """The state of a run's training."""

    step: int = 0
    """Optimizer steps so far."""
    max_steps: int | None = None
    """Steps in all; None before the log says."""
    epoch: float = 0.0
    """Passes over the training rows so far."""
    loss: float | None = None
    """Training loss, last logged."""
    eval_loss: float | None = None
    """Validation loss, last measured."""
    learning_rate: float | None = None
    """Last logged."""
    seconds_left: float | None = None
    """At the pace of the last steps; None where that is not known."""
    seconds_since: float | None = None
    """Since something was logged."""
    is_over: bool = False
    """Whether the last step is done."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


PACE_LINES = 20
"""Logged steps by which the pace is told."""


def describe_state(lines: Sequence[dict[str, Any]], now: float) -> RunState:
    """The state that logged lines tell of, at `now` in seconds since 1970; those without a time are notes."""
    lines = [line for line in lines if "time" in line]
    if not lines:
        return RunState()
    last = lines[-1]
    names = ("loss", "eval_loss", "learning_rate", "max_steps")
    newest = {name: line[name] for line in lines for name in names if name in line}
    max_steps = newest.pop("max_steps", None)
    is_over = any("train_runtime" in line for line in lines[-2:])
    return RunState(
        step=last["step"],
        max_steps=max_steps,
        epoch=last.get("epoch") or 0.0,
        seconds_left=None if is_over else _time_left(lines, max_steps),
        seconds_since=max(0.0, now - last["time"]),
        is_over=is_over,
        **newest,
    )


def _time_left(lines: Sequence[dict[str, Any]], max_steps: int | None) -> float | None:
    """Steps left, at the pace of the last logged steps since the training went on, validation included."""
    started = next(line["time"] for line in reversed(lines) if "max_steps" in line) if max_steps is not None else 0.0
    lines = [line for line in lines if line["time"] >= started]
    recent = [line for line in lines if "loss" in line][-PACE_LINES:]
    if max_steps is None or len(recent) < 2:
        return None
    steps, seconds = recent[-1]["step"] - recent[0]["step"], recent[-1]["time"] - recent[0]["time"]
    return (max_steps - recent[-1]["step"]) * seconds / steps if steps > 0 and seconds >= 0 else None
