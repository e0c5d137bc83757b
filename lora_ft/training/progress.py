"""What a run says while it trains: a bar with loss and time left on stderr, and one line a logged step in log.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_ft.fingerprint import write_whole


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

    def close(self) -> None:
        """The bar left as it is, also where training ends by an error; what is said next has a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LogFile(TrainerCallback):
    """Each logged step as a JSON line: step, epoch, seconds since 1970, and what was measured; the first one tells how
    many steps there will be."""

    def __init__(self, path: Path):
        self._path = path

    def write_line(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins the log, or takes out what a killed run wrote after the checkpoint that is gone on from."""
        if not state.is_world_process_zero:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        before = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        first = json.dumps({**_moment(state), "max_steps": state.max_steps})
        kept = [line for line in before if _is_before(line, state)]
        write_whole(self._path, "".join(f"{line}\n" for line in [first, *kept]))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.write_line({**_moment(state), **logs})


def _moment(state: Any) -> dict[str, Any]:
    return {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3)}


def _is_before(line: str, state: Any) -> bool:
    """Whether a line of the log is of a step that is done; one that was cut off by a kill is of none."""
    try:
        entry = json.loads(line)
        return entry["step"] <= state.global_step > 0 and not {"train_runtime", "max_steps"} & set(entry)
    except (ValueError, KeyError, TypeError):
        return False
