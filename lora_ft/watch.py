"""A run that trains, watched from another terminal by its folder alone."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_ft.errors import UserError
from lora_ft.evaluation.curves import Curves, read_log, trace_curves
from lora_ft.evaluation.state import RunState, describe_state
from lora_ft.fingerprint import read_json
from lora_ft.training.lock import has_ended

LOOK_EVERY_SECONDS = 1.0
QUIET_SECONDS = 120
"""Silence of the log that is worth a word: a long step, a long validation, or a run that was killed."""
BARS = "▁▂▃▄▅▆▇█"


def read_state(run: Path, now: float) -> dict[str, Any]:
    """What is known of a run at `now`: the state of its manifest, its progress, and the verdict if there is one.

    Raises:
        UserError: there is no run in the folder, or its manifest or log is damaged.
    """
    try:
        manifest = read_json(run / "run.json")
    except FileNotFoundError:
        raise UserError(str(run), None, "There is no run in this folder.", "Name a run's folder.") from None
    if "state" not in manifest:
        raise UserError(str(run / "run.json"), None, "A run's manifest tells its state.", "Name a run's folder.")
    verdict = (manifest.get("evaluation") or {}).get("verdict") or {}
    progress = describe_state(read_log(run), now)
    state = "stopped" if manifest["state"] != "finished" and has_ended(run) else manifest["state"]
    return {"state": state, **progress.to_json(), "verdict": verdict.get("name")}


def watch_run(run: Path, console: Console | None = None) -> dict[str, Any]:
    """Shows the run until it has finished, or its process is no more; returns its last state."""
    console = console or Console(highlight=False)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            state = read_state(run, time.time())
            live.update(draw_state(run, state, trace_curves(read_log(run))), refresh=True)
            if state["state"] in ("finished", "stopped"):
                return state
            time.sleep(LOOK_EVERY_SECONDS)


def draw_state(run: Path, state: dict[str, Any], curves: Curves) -> Group:
    """The state as a terminal shows it."""
    progress = RunState(**{name: state[name] for name in RunState.__dataclass_fields__})
    table = Table.grid(padding=(0, 2))
    table.add_row("", ProgressBar(total=progress.max_steps or 1, completed=progress.step, width=40))
    table.add_row("step", describe_step(progress))
    if progress.loss is not None:
        table.add_row("loss", f"{progress.loss:.4f}  {draw_line([point.loss for point in curves.train])}")
    if progress.learning_rate is not None:
        table.add_row("learning rate", f"{progress.learning_rate:.2e}")
    for point in curves.validation[-3:]:
        mark = "  lowest" if point == curves.lowest else ""
        table.add_row("validation", f"{point.loss:.4f} at step {point.step:,}{mark}")
    return Group(Text(f"{run.name}: {describe_phase(state, progress)}", style="bold"), table)


def describe_phase(state: dict[str, Any], progress: RunState) -> str:
    """What the run does now."""
    if state["state"] == "finished":
        return f"finished, {state['verdict'] or 'not judged'}"
    if state["state"] == "stopped":
        return "stopped; the same lora-ft train goes on with it"
    if progress.is_over:
        return "evaluating"
    if progress.seconds_since is not None and progress.seconds_since > QUIET_SECONDS:
        return f"nothing logged for {timedelta(seconds=round(progress.seconds_since))}"
    return "training" if progress.step else "starting"


def describe_step(progress: RunState) -> str:
    """`120 of 350, epoch 1.71, 0:00:41 left`."""
    parts = [f"{progress.step:,} of {progress.max_steps:,}" if progress.max_steps else f"{progress.step:,}"]
    parts.append(f"epoch {progress.epoch:.2f}")
    if progress.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(progress.seconds_left))} left")
    return ", ".join(parts)


def draw_line(values: list[float], width: int = 32) -> str:
    """The values as a line of `width` bars at most, the largest the highest."""
    if not values:
        return ""
    columns = [values[index * len(values) // width] for index in range(width)] if len(values) > width else values
    low, high = min(columns), max(columns)
    return "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in columns)
