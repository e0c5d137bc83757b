"""The page of a run while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_ft.evaluation.page import REFRESH_SECONDS, write_page


class LivePage(TrainerCallback):
    """The page of a training run, written anew after a logged step, every few seconds at most.

    A long run's takes longer to write; it never takes more than a hundredth of the time.
    """

    def __init__(self, run: Path):
        self._run, self._due = run, 0.0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        if state.is_world_process_zero and started >= self._due:
            write_page(self._run)
            ended = time.monotonic()
            self._due = ended + max(REFRESH_SECONDS, 100 * (ended - started))
