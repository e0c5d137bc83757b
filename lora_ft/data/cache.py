"""Prepared data on disk: folders named by a fingerprint of all that went in, built once, and again where damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.data.sources import Source
from lora_ft.data.template import load_template
from lora_ft.errors import UserError
from lora_ft.fingerprint import hash_folder, hash_json, whole_folder
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 3
"""Part of the fingerprint; raise it when the same input gives other files."""
MANIFEST = "manifest.json"
NOT_CONTENT = ("sources", "chat_template", "cache_dir", "strict")
"""Fields of the section that say where data lies or what is refused, not what it becomes."""


def fingerprint_data(sources: Sequence[Source], section: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the rows' bytes, the tokenizer, the chat template and the options; where files lie does not matter."""
    options = {name: value for name, value in asdict(section).items() if name not in NOT_CONTENT}
    described = [{**asdict(source.section), "path": source.fingerprint()} for source in sources]
    loaded = [load_template(tokenizer, section, tools) for tools in (False, True)]
    templates = [template and template.source for template in loaded]
    vocabulary = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    return hash_json([FORMAT_VERSION, options, described, templates, vocabulary])


def find_cache(section: DataSection) -> Path:
    """The folder of all prepared data."""
    chosen = section.cache_dir or os.environ.get("LORA_FT_CACHE")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_ft"
    return root.expanduser() / "data"


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """`folder` filled by `build`, unless it stands there whole; a UserError where it cannot be written.

    Whoever comes first builds; others wait for the lock, which ends with its owner's process, and find the folder
    whole. No collective operation is under way meanwhile that could time out.
    """
    if is_whole(folder):
        return
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if is_whole(folder):
                return
            with whole_folder(folder) as draft:
                build(draft)
                (draft / MANIFEST).write_text(json.dumps(hash_folder(draft)), encoding="utf-8")
    except OSError as error:
        rule = f"Prepared data cannot be written there: {error}."
        raise UserError("data.cache_dir", folder.parent, rule, "Make room, or name another folder.") from None


def is_whole(folder: Path) -> bool:
    """Whether every file of a prepared folder is there with the bytes that were written."""
    try:
        expected = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    found = hash_folder(folder)
    del found[MANIFEST]
    return found == expected
