"""A run's folder: who it belongs to, whether it can be continued, and what is written when.

The manifest `run.json` says `training` from the first write and `finished` after the last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.fingerprint import hash_folder, hash_json
from lora_ft.recipe import dump_recipe
from lora_ft.sections import Recipe

MANIFEST = "run.json"
HARMLESS = ("logging_steps", "logging_first_step", "save_steps", "save_strategy", "save_total_limit", "report_to")
"""Training settings that change nothing about the adapter."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, checked before anything is written to it."""

    path: Path
    """`output_dir`."""
    fingerprint: str
    """Hash of what decides the adapter: base, quantisation, LoRA, data, training settings."""
    identity: dict[str, Any]
    """What the fingerprint was taken of, section by section."""
    resume_from: Path | None
    """The newest checkpoint of an unfinished run of the same identity."""


def check_run_folder(recipe: Recipe, base_fingerprint: str, data_fingerprint: str, fresh: bool) -> RunFolder:
    """The run's folder if this recipe may write to it; nothing is written.

    Raises:
        UserError: it holds a finished run, a run of another recipe, files of somebody else, or cannot be written.
    """
    path = recipe.output_dir
    identity = _identity(recipe, base_fingerprint, data_fingerprint)
    fingerprint = hash_json(identity)
    _refuse_unwritable(path)
    if not path.exists() or not any(path.iterdir()):
        return RunFolder(path, fingerprint, identity, None)
    manifest = read_manifest(path, damaged_ok=fresh)
    if manifest is None:
        rule = "The folder holds files that are no run's."
        raise UserError("output_dir", str(path), rule, "Choose another folder.")
    if fresh:
        return RunFolder(path, fingerprint, identity, None)
    if manifest["fingerprint"] != fingerprint:
        raise_faults(_differences(path, manifest["identity"], identity))
    if manifest["state"] == "finished":
        rule = "The folder holds this very run, finished."
        raise UserError("output_dir", str(path), rule, "Choose another folder, or give --fresh to replace it.")
    return RunFolder(path, fingerprint, identity, _newest_checkpoint(path))


def claim_run_folder(run: RunFolder, recipe: Recipe, manifest: dict[str, Any], fresh: bool) -> None:
    """Writes the resolved recipe and the first manifest; with `fresh`, what an older run left is removed first."""
    if fresh:
        remove_run(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_manifest(run, "training", manifest)


def write_manifest(run: RunFolder, state: str, content: dict[str, Any]) -> dict[str, Any]:
    """`run.json`, replaced in one step; when finished, with the hash of every file of the run."""
    manifest = {"state": state, "fingerprint": run.fingerprint, "identity": run.identity, **content}
    if state == "finished":
        manifest["files"] = {name: digest for name, digest in hash_folder(run.path).items() if name != MANIFEST}
    draft = run.path / f".{MANIFEST}.{os.getpid()}.partial"
    draft.write_text(json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(draft, run.path / MANIFEST)
    return manifest


def read_manifest(path: Path, damaged_ok: bool = False) -> dict[str, Any] | None:
    """What `run.json` says, or None where there is no run.

    Raises:
        UserError: the file is damaged, unless `damaged_ok`; then it is an empty manifest.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as fault:
        if damaged_ok:
            return {}
        raise UserError(
            str(path / MANIFEST), None, f"This is not JSON: {fault}.", "Give --fresh to start over."
        ) from None
    return manifest if {"state", "fingerprint", "identity"} <= set(manifest) else None


def check_space(run: RunFolder, recipe: Recipe, trainable_parameters: int, base_bytes: int) -> None:
    """Nothing, or a UserError when the disk has no room for checkpoints, adapter and merged model.

    A checkpoint holds each trained parameter in float32 and two moments of Adam; one more is being written while
    `save_total_limit` of them lie there.
    """
    checkpoints = int(recipe.training.get("save_total_limit") or 2) + 1
    needed_bytes = trainable_parameters * 4 * (3 * checkpoints + 1) + (base_bytes if recipe.export.merge else 0)
    folder = next(parent for parent in [run.path, *run.path.parents] if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        rule = f"The run writes about {needed_bytes / 1e9:.2f} GB there, and {free_bytes / 1e9:.2f} GB are free."
        raise UserError("output_dir", str(run.path), rule, "Free space, or name a folder on another disk.")


def remove_run(path: Path) -> None:
    """Deletes what runs write in `path`, and nothing else."""
    for name in ("adapter", "merged", "report", "initial_adapter"):
        shutil.rmtree(path / name, ignore_errors=True)
    for checkpoint in path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name in (MANIFEST, "recipe.yaml", "log.jsonl"):
        (path / name).unlink(missing_ok=True)


def _identity(recipe: Recipe, base_fingerprint: str, data_fingerprint: str) -> dict[str, Any]:
    training = {key: value for key, value in recipe.training.items() if key not in HARMLESS}
    return {
        "base": base_fingerprint,
        "dtype": recipe.model.dtype,
        "adapter": recipe.model.adapter,
        "quantization": recipe.quantization,
        "lora": recipe.lora,
        "data": data_fingerprint,
        "training": training,
    }


def _differences(path: Path, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Fault]:
    """One fault for each setting in which the run that lies there differs from the one asked for."""
    fix = "Choose another output_dir, or give --fresh to replace it."
    for section in new:
        before, after = old.get(section), new[section]
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted({*before, *after}):
                if before.get(key) != after.get(key):
                    rule = f"The run in {path} has {before.get(key)}."
                    yield Fault(f"{section}.{key}", after.get(key), rule, fix)
        elif before != after:
            shown = None if section in {"base", "data"} else after
            yield Fault(section, shown, f"The run in {path} was made with another {section}.", fix)


def _newest_checkpoint(path: Path) -> Path | None:
    steps = {
        int(p.name.rpartition("-")[2]): p for p in path.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()
    }
    whole = [step for step, folder in steps.items() if (folder / "trainer_state.json").is_file()]
    return steps[max(whole)] if whole else None


def _refuse_unwritable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError("output_dir", str(path), "This is a file.", "Name a folder.")
    nearest = next(parent for parent in [path, *path.parents] if parent.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError("output_dir", str(path), f"{nearest} cannot be written to.", "Name another folder.")
