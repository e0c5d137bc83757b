"""An adapter folder, opened without touching its tensors."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.export.manifest import MANIFEST_NAME, AdapterManifest, read_manifest
from lora_ft.fingerprint import hash_file, hash_tensors, read_json, read_safetensors_header
from lora_ft.libraries import load_libraries
from lora_ft.model.adapter import CONFIG_NAME, TENSORS_NAME, read_lora

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

KEY_PREFIX = "base_model.model."
"""What PEFT writes before the base model's own names."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on disk."""

    folder: Path
    """Where its files lie."""
    config: LoraConfig
    """adapter_config.json."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor in adapter_model.safetensors, by its key without `base_model.model.`."""
    manifest: AdapterManifest | None
    """What lora_ft recorded when it saved the adapter; None for one that another tool saved."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside its base may run."""

    def read(self) -> dict[str, torch.Tensor]:
        """All its tensors, by the keys of `shapes`."""
        from safetensors.torch import load_file

        return {key.removeprefix(KEY_PREFIX): tensor for key, tensor in load_file(self.folder / TENSORS_NAME).items()}


def find_adapter(folder: Path) -> Path:
    """The folder of a run's adapter; any other folder itself."""
    return folder / "adapter" if (folder / "adapter" / CONFIG_NAME).is_file() else folder


def unfinished_run(run: Path) -> UserError:
    """The error for a run that has no adapter yet."""
    rule = "This run has not come to its end, so it has no adapter."
    command = shlex.join(["lora-ft", "train", str(run / "recipe.yaml"), f"output_dir={run}"])  # it may have been moved
    return UserError(str(run), None, rule, f"Go on: {command}")


def open_adapter(folder: Path, trust_remote_code: bool = False) -> Adapter:
    """The LoRA adapter in `folder`.

    Raises:
        UserError: `folder` holds no adapter, one of another method than LoRA, pickled weights only, or damaged files.
    """
    if not (folder / CONFIG_NAME).is_file():
        rule = f"An adapter folder holds {CONFIG_NAME} and {TENSORS_NAME}."
        raise UserError(str(folder), None, rule, "Give the folder that was saved, such as runs/NAME/adapter.")
    method = read_adapter_fields(folder).get("peft_type")
    if method != "LORA":
        raise UserError(str(folder / CONFIG_NAME), f"peft_type {method}", "Only LoRA adapters are handled.", "")
    if not (folder / TENSORS_NAME).is_file():
        rule = f"{TENSORS_NAME} is missing. Pickled weights (.bin) could run code and are not opened."
        raise UserError(str(folder), None, rule, "Save the adapter again with PEFT; it writes safetensors.")
    header, _ = read_safetensors_header(folder / TENSORS_NAME)
    strangers = sorted(key for key in header if not key.startswith(KEY_PREFIX))
    if strangers:
        rule = f"Every tensor of a PEFT adapter is named `{KEY_PREFIX}…`."
        raise UserError(str(folder / TENSORS_NAME), strangers[0], rule, "Save the adapter with PEFT's save_pretrained.")
    shapes = {key.removeprefix(KEY_PREFIX): tuple(tensor["shape"]) for key, tensor in header.items()}
    load_libraries()  # after the faults that need none of them
    return Adapter(folder, read_lora(folder), shapes, read_manifest(folder), trust_remote_code)


def refuse_changed(folder: Path) -> None:
    """Nothing, if weights and config of the adapter in `folder` are those that were saved; another tool's do not say.

    Raises:
        UserError: one of the two has changed, so that nothing made of it would be of what was trained.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    fix = f"Copy it again, or remove {MANIFEST_NAME} to take it as another tool's, of which nothing is known."
    hashes = {TENSORS_NAME: (hash_tensors, manifest.tensors), CONFIG_NAME: (hash_file, manifest.files.get(CONFIG_NAME))}
    raise_faults(
        Fault(str(folder / name), None, "It has changed since the adapter was saved.", fix)
        for name, (hash_content, saved) in hashes.items()
        if saved is not None and (folder / name).is_file() and hash_content(folder / name) != saved
    )


def read_adapter_fields(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it is written.

    Raises:
        UserError: it is no JSON object.
    """
    return read_json(folder / CONFIG_NAME, "Copy the adapter again.")
