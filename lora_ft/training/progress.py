"""What a run says while it trains: a bar with loss and time left on stderr, and one line a logged step in log.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Progress(TrainerCallback):
    """A bar over optimizer steps; only the first rank draws."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            from tqdm import tqdm

            shape = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", bar_format=shape)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._bar is not None and logs:
            self._losses |= {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
            self._bar.set_postfix({name: f"{loss:.3f}" for name, loss in self._losses.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LogFile(TrainerCallback):
    """Each logged step as a JSON line: step, epoch, seconds since 1970, and what was measured; the first one tells how
    many steps there will be."""

    def __init__(self, path: Path):
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self._write(state, logs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(state, {"max_steps": state.max_steps})

    def _write(self, state: Any, logs: dict[str, float]) -> None:
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs}
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
