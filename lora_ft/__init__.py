"""LoRA and QLoRA fine-tuning that proves what it did.

The names below are all a notebook needs; each is imported when it is first used, so `import lora_ft` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

PUBLIC = {
    "load_recipe": "lora_ft.recipe",
    "run_recipe": "lora_ft.run",
    "load_base": "lora_ft.model.load",
    "attach_adapter": "lora_ft.model.adapter",
    "prepare_dataset": "lora_ft.data.prepare",
    "train_model": "lora_ft.training.trainer",
    "save_adapter": "lora_ft.export.save",
    "verify_folder": "lora_ft.export.verify",
    "merge_adapter": "lora_ft.export.merge",
    "UserError": "lora_ft.errors",
}
"""Name → room it lives in."""

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module lora_ft has no attribute {name}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
