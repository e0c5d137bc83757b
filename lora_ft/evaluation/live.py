"""The page of a run while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_ft.evaluation.page import REFRESH_SECONDS, write_page


class LivePage(TrainerCallback):
    """The page of a training run, written anew after a logged step, every few seconds at most."""

    def __init__(self, run: Path):
        self._run, self._written = run, 0.0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self._written >= REFRESH_SECONDS:
            write_page(self._run)
            self._written = time.monotonic()
