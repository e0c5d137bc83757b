"""A run's folder: who it belongs to, whether it can be continued, and what is written when.

The manifest `run.json` says `clearing` while what an older run left is removed, `training` until the last file is
written, and `finished` then. It is replaced in one step and written first, so a killed process leaves a run in a
known state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError, raise_faults
from lora_ft.fingerprint import hash_folder, hash_json, hash_tensors, whole_folder, write_whole
from lora_ft.model.adapter import CONFIG_NAME, TENSORS_NAME
from lora_ft.recipe import dump_recipe
from lora_ft.sections import Recipe
from lora_ft.training.checkpoint import find_damage, find_intact, find_leftovers, is_weights_only, list_checkpoints
from lora_ft.training.identity import Identity, describe_changes, find_differences, identify_run
from lora_ft.training.lock import LOCK, refuse_if_locked, run_lock

MANIFEST = "run.json"
WARM_START = "warm_start"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, checked before anything is written to it."""

    path: Path
    """`output_dir`."""
    identity: Identity
    """What decides the adapter, and what does not."""
    resume_from: Path | None = None
    """The newest intact checkpoint of an unfinished run of the same identity."""
    clears: bool = False
    """Whether what lies there is removed first."""
    warm_start: Path | None = None
    """Folder of the weights that a new run starts from."""
    notes: tuple[str, ...] = ()
    """Settings that differ from those of the run that goes on, and may."""
    found: dict[str, Any] | None = None
    """The manifest that lay there."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the adapter."""
        return hash_json(self.identity.decisive)


def check_run_folder(
    recipe: Recipe,
    base_fingerprint: str,
    data_fingerprint: str,
    *,
    processes: int = 1,
    strategy: str = "single",
    fresh: bool = False,
    warm: bool = False,
) -> RunFolder:
    """The run's folder if this recipe may write to it; nothing is written.

    Raises:
        UserError: it holds a finished run, a run of another recipe, files of somebody else, no intact checkpoint, or
            cannot be written to; or another process writes to it.
    """
    path = recipe.output_dir
    refuse_unwritable(path)
    identity = identify_run(recipe, base_fingerprint, data_fingerprint, processes, strategy)
    if not path.exists() or not _visible(path):
        if warm:
            raise _nothing_warm(path)
        return RunFolder(path, identity)
    refuse_if_locked(path)
    manifest = read_manifest(path, damaged_ok=fresh)
    if manifest is None:
        rule = "The folder holds files that are no run's."
        raise UserError("output_dir", str(path), rule, "Choose another folder.")
    if warm:
        start = _find_warm_start(path, manifest)
        identity = identity.starting_from(_hash_weights(start))
        return RunFolder(path, identity, clears=True, warm_start=start, found=manifest)
    if fresh or _is_untouched(path, manifest):
        return RunFolder(path, identity, clears=True, found=manifest)
    return replace(_go_on(path, identity, manifest), found=manifest)


def _go_on(path: Path, identity: Identity, manifest: dict[str, Any]) -> RunFolder:
    """The folder of a run that was begun, if this is the same run."""
    try:
        before = Identity(**manifest["identity"])
    except TypeError:
        rule = "Its manifest is of another version."
        raise UserError("output_dir", str(path), rule, "Give --fresh to start over.") from None
    warm_start = None
    if (digest := before.decisive.get(WARM_START)) is not None:
        identity, warm_start = identity.starting_from(digest), path / WARM_START
    raise_faults(find_differences(path, before, identity))
    if manifest["state"] == "finished":
        rule = "The folder holds this very run, finished."
        raise UserError("output_dir", str(path), rule, "Choose another folder, or give --fresh to replace it.")
    if manifest["state"] == "clearing":
        return RunFolder(path, identity, clears=True, warm_start=warm_start)
    checkpoint = find_intact(path)
    if checkpoint is not None and is_weights_only(checkpoint):
        rule = "It holds weights without the state of optimizer, schedule and random numbers (save_only_model)."
        fix = "Give --warm-start to begin a new run with these weights, or --fresh to start over."
        raise UserError("output_dir", str(checkpoint), rule, fix)
    if checkpoint is None and warm_start is not None and _hash_weights(warm_start) != digest:
        rule = "The weights that this run started from are not as they were written."
        raise UserError("output_dir", str(warm_start), rule, "Give --fresh to start over.")
    return RunFolder(path, identity, checkpoint, False, warm_start, tuple(describe_changes(before, identity)))


@contextmanager
def claim_run_folder(run: RunFolder, recipe: Recipe, manifest: dict[str, Any]) -> Iterator[None]:
    """The folder, for one writer as long as the block lasts; the first manifest and the resolved recipe are written.

    Raises:
        UserError: another process writes there, or has written there since the folder was checked.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with run_lock(run.path):
        is_damaged = run.resume_from is not None and find_damage(run.resume_from) is not None
        if is_damaged or read_manifest(run.path, damaged_ok=True) != run.found:
            rule = "Another process has changed it meanwhile."
            raise UserError("output_dir", str(run.resume_from or run.path), rule, "Run the same command again.")
        if run.clears:
            _clear(run, manifest)
        for leftover in find_leftovers(run.path):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_manifest(run, "training", manifest)
        write_whole(run.path / "recipe.yaml", dump_recipe(recipe))
        yield


def write_manifest(run: RunFolder, state: str, content: dict[str, Any]) -> dict[str, Any]:
    """`run.json`, replaced in one step; when finished, with the hash of every file of the run."""
    manifest = {"state": state, "fingerprint": run.fingerprint, "identity": vars(run.identity), **content}
    if state == "finished":
        own = {MANIFEST, LOCK}
        manifest["files"] = {name: digest for name, digest in hash_folder(run.path).items() if name not in own}
    write_whole(run.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")
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
    except (ValueError, RecursionError) as fault:
        if damaged_ok:
            return {}
        raise UserError(
            str(path / MANIFEST),
            None,
            f"This is not JSON: {fault}.",
            "Bring the file back, or train again with --fresh.",
        ) from None
    return manifest if isinstance(manifest, dict) and {"state", "fingerprint", "identity"} <= set(manifest) else None


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
        rule = f"The run writes about {needed_bytes / 1e6:,.0f} MB there, and {free_bytes / 1e6:,.0f} MB are free."
        raise UserError("output_dir", str(run.path), rule, "Free space, or name a folder on another disk.")


def remove_run(path: Path) -> None:
    """Deletes what runs write in `path`, but for `run.json` and the weights of a warm start, and nothing else."""
    for folder in [path / "adapter", path / "merged", path / "report", *list_checkpoints(path)]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("recipe.yaml", "log.jsonl"):
        (path / name).unlink(missing_ok=True)


def _clear(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Makes room for a new run. Its weights, if it starts from some, are taken out first."""
    kept = run.path / WARM_START
    if run.warm_start is None:
        shutil.rmtree(kept, ignore_errors=True)
    elif run.warm_start != kept:
        with whole_folder(kept) as draft:
            for name in (TENSORS_NAME, CONFIG_NAME):
                shutil.copyfile(run.warm_start / name, draft / name)
    write_manifest(run, "clearing", manifest)
    remove_run(run.path)


def _is_untouched(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether a run ended before it had learned or logged anything, so that any other may take its place."""
    kept = list_checkpoints(path) or (path / WARM_START).exists() or (path / "adapter").exists()
    log = path / "log.jsonl"
    return manifest["state"] == "training" and not kept and not (log.exists() and log.stat().st_size)


def _find_warm_start(path: Path, manifest: dict[str, Any]) -> Path:
    """The weights that the run in the folder ended with, or the newest that it saved."""
    intact = [checkpoint for checkpoint in list_checkpoints(path) if find_damage(checkpoint) is None]
    exported, kept = path / "adapter", path / WARM_START
    orders = {"finished": [exported, kept], "clearing": [kept, *intact, exported]}
    for folder in orders.get(manifest.get("state", ""), [*intact, exported, kept]):
        if (folder / TENSORS_NAME).is_file():
            return folder
    raise _nothing_warm(path)


def _nothing_warm(path: Path) -> UserError:
    rule = "--warm-start takes the weights of the run in this folder, and none lie there."
    return UserError("output_dir", str(path), rule, "Leave it out.")


def _hash_weights(folder: Path) -> str:
    try:
        return hash_tensors(folder / TENSORS_NAME)
    except (OSError, UserError) as fault:
        rule = "The weights to start from cannot be read."
        raise UserError("output_dir", str(folder), rule, "Give --fresh to start over.") from fault


def _visible(path: Path) -> list[Path]:
    """What lies in the folder, but for what this house's own killed processes may have left."""
    hidden = {path / LOCK, *find_leftovers(path)}
    return [entry for entry in path.iterdir() if entry not in hidden]


def refuse_unwritable(path: Path) -> None:
    """Nothing, if a run could be written to `path`, as far as that can be told without writing.

    Raises:
        UserError: it is a file, or the nearest folder that is there cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise UserError("output_dir", str(path), "This is a file.", "Name a folder.")
    nearest = next(parent for parent in [path, *path.parents] if parent.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError("output_dir", str(path), f"{nearest} cannot be written to.", "Name another folder.")
