"""Where the paths in a recipe lead: inputs from its own folder, what was said on the command line from here."""

from __future__ import annotations

import os
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from lora_ft.builtin import is_builtin, locate_data
from lora_ft.errors import UserError
from lora_ft.sections import Recipe
from lora_ft.yaml_lines import Key, dotted

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1000
"""What the file systems of Linux, macOS and Windows take for one name, and what leaves room below a folder."""
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Suffixes of the kinds of files that rows are read from."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow."""


def resolve_paths(recipe: Recipe, folder: Path, overridden: set[Key]) -> Recipe:
    """The same recipe with every local path absolute; those whose keys are `overridden` start in the working folder.

    Raises:
        UserError: no file system takes a path, or nothing of a `builtin:` name is embedded.
    """

    def resolve(text: str, *key: str | int) -> str:
        start = Path.cwd() if any(key[: len(k)] == k for k in overridden) else folder
        return str((start / _read_path(text, key)).resolve())

    model = recipe.model
    if not is_builtin(model.base) and (
        Path(base := resolve(model.base, "model", "base")).exists() or _is_path(model.base)
    ):
        model = replace(model, base=base)
    if model.adapter:
        model = replace(model, adapter=resolve(model.adapter, "model", "adapter"))
    sources = []
    for index, source in enumerate(recipe.data.sources):
        if is_builtin(source.path):
            locate_data(source.path)
        else:
            local = resolve(source.path, "data", "sources", index, "path")
            source = replace(source, path=source.path if _is_hub_id(source.path, local) else local)
        sources.append(source)
    data = replace(recipe.data, sources=tuple(sources))
    if data.chat_template:
        data = replace(data, chat_template=resolve(data.chat_template, "data", "chat_template"))
    evaluation = recipe.evaluation
    functions = (resolve(name, "evaluation", "metrics") if ":" in name else name for name in evaluation.metrics)
    evaluation = replace(evaluation, metrics=tuple(functions))
    if evaluation.general and not is_builtin(evaluation.general):
        evaluation = replace(evaluation, general=resolve(evaluation.general, "evaluation", "general"))
    output_dir = _read_path(str(recipe.output_dir), ("output_dir",)).absolute()
    return replace(recipe, output_dir=output_dir, model=model, data=data, evaluation=evaluation)


def _read_path(text: str, key: Key) -> Path:
    """A path with its `~` replaced.

    Raises:
        UserError: no file system takes it, or it begins with the home of nobody.
    """
    longest_name = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    if longest_name > MAX_NAME_BYTES or len(os.fsencode(text)) > MAX_PATH_BYTES:
        rule = f"A file's name has at most {MAX_NAME_BYTES} bytes, and its whole path {MAX_PATH_BYTES}."
        raise UserError(dotted(key), f"{text[:40]}…", rule, "Shorten it.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(dotted(key), text[:80], "There is no home of that user here.", "Write the path out.") from None


def _is_path(text: str) -> bool:
    """Whether a base is meant as a folder, though none is there: a Hub id is `NAME` or `ORGANISATION/NAME`."""
    return text.startswith((".", "~", "/")) or text.count("/") > 1


def _is_hub_id(text: str, local: str) -> bool:
    """Whether a source is a Hub data set: of the form ORGANISATION/NAME, no kind of file, and nothing lies there.

    A dot alone makes no file: `teknium/OpenHermes-2.5`.
    """
    is_name = text.count("/") == 1 and not _is_path(text) and not has_magic(text)
    return is_name and split_suffixes(Path(text))[0] is None and not Path(local).exists()


def split_suffixes(path: Path) -> tuple[str | None, str | None]:
    """(kind, compression) of a file's name, each as a suffix; None for a kind that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    kind = suffixes[-1] if suffixes and suffixes[-1] in KINDS else None
    return kind, compression
