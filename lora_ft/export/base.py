"""The base of an adapter: found on this machine, and proven to be the one the adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from lora_ft.errors import UserError
from lora_ft.export.adapter import Adapter, refuse_changed
from lora_ft.export.manifest import read_manifest
from lora_ft.fingerprint import BaseIdentity
from lora_ft.model.load import find_base


def base_of_adapter(adapter: Adapter, override: str | None = None) -> BaseIdentity:
    """The base `adapter` was trained on, or `override` in its place.

    Raises:
        UserError: the adapter names no base, it cannot be found, or it is another one than it was trained on.
    """
    manifest = adapter.manifest
    name = override or recorded_base(adapter)
    revision = manifest.revision if manifest else adapter.config.revision
    base = find_base(name, revision if override is None else None, adapter.trust_remote_code)
    if manifest and manifest.base_fingerprint != base.fingerprint:
        trained_on = f"{manifest.base} (fingerprint {manifest.base_fingerprint[:12]})"
        rule = f"The adapter was trained on {trained_on}; this is another base ({base.fingerprint[:12]})."
        raise UserError(str(adapter.folder), name, rule, "Give the base it was trained on with --base.")
    return base


def refuse_other_base(folder: Path, base: BaseIdentity, task_type: str) -> None:
    """Nothing, if the adapter in `folder`, which is to go on training, was made on this base and for this task.

    Raises:
        UserError: it was made for another, where its update means nothing, or has changed since. An adapter of another
            tool does not say.
    """
    refuse_changed(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return
    if manifest.base_fingerprint != base.fingerprint:
        before, now = f"{manifest.base} ({manifest.base_fingerprint[:12]})", f"{base.name} ({base.fingerprint[:12]})"
        rule = f"It was trained on {before}, and this base is {now}."
        raise UserError("model.adapter", str(folder), rule, "Name its base as model.base, or leave the adapter out.")
    if manifest.task_type not in (None, task_type):
        rule = f"It was trained as {manifest.task_type}, and data.task wants {task_type}."
        raise UserError("model.adapter", str(folder), rule, "Change data.task, or leave the adapter out.")


def recorded_base(adapter: Adapter) -> str:
    """The base's name as recorded; for a folder, where it lay when the adapter was saved if it is still there.

    Raises:
        UserError: the adapter names none.
    """
    written = adapter.config.base_model_name_or_path
    if written and Path(written).is_dir():
        return written
    name = adapter.manifest.base if adapter.manifest else written
    if not name:
        raise UserError(str(adapter.folder), None, "The adapter does not say what its base is.", "Give it with --base.")
    return name
