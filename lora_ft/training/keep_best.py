"""The checkpoints of lowest validation loss are kept, and the newest, which a broken run goes on from."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class KeepBest(TrainerCallback):
    """After each save, deletes checkpoints until `limit` are left: the best, and the newest if it is none of them.

    transformers' own limit keeps the best one and for the rest the newest.
    """

    def __init__(self, limit: int):
        self._limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        losses = {line["step"]: line["eval_loss"] for line in state.log_history if "eval_loss" in line}
        found = {int(path.name.rpartition("-")[2]): path for path in Path(args.output_dir).glob("checkpoint-*")}
        ranked = sorted(found, key=lambda step: (losses.get(step, math.inf), -step))
        for step in ranked[self._limit :]:
            if step != max(found):
                shutil.rmtree(found[step])
