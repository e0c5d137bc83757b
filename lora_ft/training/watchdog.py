"""When nothing moves for minutes, every rank says since when, where it stands, and what it waits for."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

NUM_FRAMES = 6


class Watchdog(TrainerCallback):
    """Writes to stderr when no batch, evaluation or save has ended for `minutes`, and again each time as long."""

    def __init__(self, minutes: float):
        self._seconds = minutes * 60
        self._moved, self._last = time.monotonic(), "the start"
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the thread that runs the block."""
        if not self._seconds:
            yield
            return
        self._over.clear()
        self._moved = time.monotonic()
        watcher = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True, name="watchdog")
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join()

    def _watch(self, watched: int) -> None:
        said = self._moved
        while not self._over.wait(min(self._seconds / 4, 5.0)):
            now = time.monotonic()
            if now - max(self._moved, said) >= self._seconds:
                said = now
                print(self._describe(watched, now - self._moved), file=sys.stderr, flush=True)

    def _describe(self, watched: int, seconds: float) -> str:
        """Which rank has stood for how long, and the innermost calls that it is in."""
        frame = sys._current_frames().get(watched)
        calls = traceback.extract_stack(frame)[-NUM_FRAMES:] if frame is not None else []
        rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        head = f"rank {rank} of {ranks}: nothing has moved for {seconds / 60:.1f} minutes, since {self._last}; it is in"
        return "\n".join([head, *(f"  {call.name}  {call.filename}:{call.lineno}  {call.line}" for call in calls)])

    def _move(self, last: str) -> None:
        self._moved, self._last = time.monotonic(), last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(f"the start of step {state.global_step + 1}")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(f"a batch of step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(f"the end of step {state.global_step}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(f"an evaluation batch after step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(f"the checkpoint of step {state.global_step}")
