"""Checkpoints that are whole or invisible: written aside, hashed, synced to disk, and renamed when nothing is missing.

    .saving/checkpoint-20/    being written; nobody looks there
    checkpoint-20/            every file as its seal says, `checkpoint.json`, which was written last
    .checkpoint-10.old/       being deleted

A process can be killed between any two of these steps; what has the name of a checkpoint can be gone on from.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError
from lora_ft.fingerprint import hash_folder, hash_json, publish_folder

PREFIX = "checkpoint-"
SAVING = ".saving"
SEAL = "checkpoint.json"
LEFTOVERS = (SAVING, ".*.partial", ".*.old")
"""What a killed process may have left in a run's folder."""


def draft_checkpoint(run: Path, step: int) -> Path:
    """A new folder for the checkpoint of a step, where nobody looks for one."""
    shutil.rmtree(run / SAVING, ignore_errors=True)
    draft = run / SAVING / f"{PREFIX}{step}"
    draft.mkdir(parents=True)
    return draft


def seal_checkpoint(draft: Path, *, weights_only: bool) -> Path:
    """The draft as a checkpoint that can be seen; its seal is written when all else is there."""
    content = {"step": int(draft.name.removeprefix(PREFIX)), "weights_only": weights_only, "files": hash_folder(draft)}
    (draft / SEAL).write_bytes(_render_seal(content))
    target = draft.parent.parent / draft.name
    publish_folder(draft, target)
    draft.parent.rmdir()
    return target


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints by the step in their names, the newest first, damaged ones among them."""
    steps = {path: path.name.removeprefix(PREFIX) for path in run.glob(f"{PREFIX}*") if path.is_dir()}
    numbered = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    return sorted(numbered, key=lambda path: numbered[path], reverse=True)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where every byte is as it was written."""
    try:
        raw = (checkpoint / SEAL).read_bytes()
        content = json.loads(raw)
        content.pop("sha256")
        if raw != _render_seal(content) or checkpoint.name != f"{PREFIX}{content['step']}":
            return f"{SEAL} is not as it was written"
        found = hash_folder(checkpoint)
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is not as it was written"
    except OSError as fault:
        return f"it cannot be read: {fault.strerror}"
    for name, digest in content["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not as it was written"
    return None


def find_intact(run: Path) -> Path | None:
    """The newest checkpoint without damage, or None where there is no checkpoint; damaged ones are named on stderr.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for checkpoint in list_checkpoints(run):
        damage = find_damage(checkpoint)
        if damage is None:
            for line in damaged if os.environ.get("RANK", "0") == "0" else ():
                print(f"{line}; going back to {checkpoint.name}", file=sys.stderr)
            return checkpoint
        damaged.append(f"{checkpoint} is passed over: {damage}")
    if damaged:
        rule = "No checkpoint of this run is intact."
        raise UserError("output_dir", "; ".join(damaged), rule, "Give --fresh to start over.")
    return None


def is_weights_only(checkpoint: Path) -> bool:
    """Whether an intact checkpoint holds the adapter without optimizer, schedule and random state."""
    return bool(json.loads((checkpoint / SEAL).read_bytes())["weights_only"])


def rotate_checkpoints(run: Path, limit: int | None, saved: Path, best_steps: Sequence[int] = ()) -> None:
    """Deletes checkpoints beyond `limit`: the one just saved stays in any case, the best ones before the others.

    Those of later steps were passed over as damaged when the run went on, and go first. `best_steps` are evaluated
    steps, the best first; without any, the newest `limit` stay.
    """
    checkpoints = list_checkpoints(run)
    if not limit or limit < 0 or len(checkpoints) <= 1:
        return
    candidates = checkpoints[checkpoints.index(saved) :]
    named = {path.name: path for path in candidates}
    best = [named[name] for step in best_steps if (name := f"{PREFIX}{step}") in named][:limit]
    kept = list(dict.fromkeys([saved, *best]))
    kept += [path for path in candidates if path not in kept][: max(0, limit - len(kept))]
    for path in checkpoints:
        if path not in kept:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint; from the first moment on it is none."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def find_leftovers(run: Path) -> Iterator[Path]:
    """What killed processes left behind, which nobody will ask for."""
    for pattern in LEFTOVERS:
        yield from run.glob(pattern)


def _render_seal(content: dict[str, Any]) -> bytes:
    """One text for one content, its own hash in it, so that no byte of it can change unnoticed."""
    return (json.dumps({**content, "sha256": hash_json(content)}, indent=2, sort_keys=True) + "\n").encode()
