"""Runs side by side: their figures on the test split, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_ft.errors import UserError
from lora_ft.evaluation.report import REPORT, read_report
from lora_ft.fingerprint import read_json

UNREMARKABLE = ("output_dir", "export")
"""Parts of a recipe by which runs always differ."""


@dataclass(frozen=True)
class ComparedRun:
    """One run, as a column."""

    name: str
    """Its folder's name."""
    verdict: str
    """In two or three words."""
    settings: dict[str, Any]
    """What not all runs have alike, as `section.key`."""
    figures: dict[str, dict[str, Any]]
    """Figures of the tuned model on the test split, as in `report.json`."""
    general: dict[str, Any] | None
    """Loss on general text."""
    num_parameters: int
    """Trained parameters."""
    train_seconds: float | None
    """What training took."""
    data: str
    """Fingerprint of its data: figures of runs with different data are of different test rows."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs in the given folders, in their order.

    Raises:
        UserError: a folder holds no run that was evaluated, or one that has not ended.
    """
    manifests = [_read_json(folder) for folder in folders]
    settings = keep_differences([_read_settings(folder) for folder in folders])
    runs = []
    for folder, manifest, own in zip(folders, manifests, settings, strict=True):
        report = read_report(folder)
        if report is None and not (folder / "adapter").is_dir():
            rule = "The run has not come to its end, so there is nothing to compare."
            raise UserError(str(folder), None, rule, "Wait for it, or go on with it: lora-ft watch says which.")
        if report is None:
            rule = "The run was not evaluated yet."
            raise UserError(str(folder), None, rule, f"Run: lora-ft evaluate {folder}")
        if absent := [name for name in ("verdict", "figures", "general") if name not in report]:
            rule = f"A report has {', '.join(absent)}."
            raise UserError(str(folder / "report" / REPORT), None, rule, f"Run: lora-ft evaluate {folder}")
        runs.append(
            ComparedRun(
                name=folder.resolve().name,
                verdict=report["verdict"]["name"],
                settings=own,
                figures=report["figures"],
                general=report["general"],
                num_parameters=manifest["trainable_parameters"],
                train_seconds=manifest.get("training", {}).get("train_runtime"),
                data=manifest.get("identity", {}).get("decisive", {}).get("data", ""),
            )
        )
    return runs


def keep_differences(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each recipe, flat, the keys whose values are not alike in all; a key that is absent is None."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    unlike = [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]
    return [{key: recipe.get(key) for key in unlike} for recipe in recipes]


def _read_json(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / "run.json")
    except FileNotFoundError:
        raise UserError(str(folder), None, "There is no run in this folder.", "Name folders of runs.") from None
    if "trainable_parameters" not in manifest:
        rule = "A run's manifest counts the parameters that were trained."
        raise UserError(str(folder / "run.json"), None, rule, "Name folders of runs.")
    return manifest


def _read_settings(folder: Path) -> dict[str, Any]:
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return dict(_flatten(yaml.safe_load(text)))


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and its value, for every leaf of a recipe."""
    if key in UNREMARKABLE:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield key, value
        return
    for name, item in items:
        yield from _flatten(item, f"{key}.{name}" if key else str(name))
