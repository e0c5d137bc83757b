"""4-bit weights on disk, so that a base is quantised once and not at every start.

    <cache>/quantised/<key>/   model.safetensors, config.json      as stock transformers reads them
                               entry.json                          what they were made of, and the checksum of each file
                      <key>.lock                                   held while they are made

An entry is kept only if transformers reads from it, bit for bit, what it had made of the base, so whoever reads the
entry reads the base. Read back, weights are mapped from the file, not copied: seconds become tenths, and memory is
taken as layers are used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.fingerprint import BaseIdentity, hash_json, list_weight_files, whole_folder
from lora_ft.libraries import garbage_kept
from lora_ft.model.machine import release_memory
from lora_ft.model.stored import read_stored

if TYPE_CHECKING:
    import torch
    from filelock import BaseFileLock
    from transformers import BitsAndBytesConfig, PreTrainedModel

ENTRY = "entry.json"
FORMAT_VERSION = 2
"""Part of every key; raise it when the same base would be stored in another way."""
SPARE_BYTES = 2 * 2**30
"""Disk that is left free; the cache is a convenience."""
CHUNK_BYTES = 8 * 2**20
"""What is hashed at a time, without Python's lock: long enough for the thread that reads to go on meanwhile."""


@dataclass(frozen=True)
class CachedBase:
    """One quantised base on disk."""

    folder: Path
    """Where it lies."""
    base: str
    """The base, as the recipe that made it named it."""
    revision: str | None
    """Its commit, for a Hub base."""
    quantization: dict[str, Any]
    """The BitsAndBytesConfig that was used."""
    num_bytes: int
    """Size on disk."""
    last_used: float
    """Seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def load_quantised(
    auto_class: Any, identity: BaseIdentity, config: BitsAndBytesConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and loading info of `auto_class.from_pretrained(identity.folder, **options)`, quantised by `config`.

    4-bit weights come from the cache, or go there. Whoever comes first quantises; others wait for the lock, which ends
    with its owner's process, and read. Damaged weights are made anew. Where nothing can be written (a full or read-only
    disk) the model is quantised as if there were no cache.
    """
    load = auto_class.from_pretrained
    quantised = {**options, "quantization_config": config, "output_loading_info": True}
    if not _is_cacheable(identity, config, options):
        return load(identity.folder, **quantised)
    folder = find_cache() / _key(auto_class, identity, config, options)
    lock = _lock(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        return load(identity.folder, **quantised)
    try:
        found = _read(auto_class, folder, options)
        if found is None:
            found = load(identity.folder, **quantised)
            if _store(auto_class, found, folder, identity, config, options):
                del found  # what quantising took is given back, and the weights are mapped as at every later start
                release_memory()
                found = _read(auto_class, folder, options)
    finally:
        lock.release()
    model, info = found or load(identity.folder, **quantised)
    model.name_or_path = model.config.name_or_path = str(identity.folder)
    return model, info


def find_cache() -> Path:
    """The folder of all quantised bases: below `LORA_FT_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("LORA_FT_CACHE")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_ft"
    return root.expanduser() / "quantised"


def list_cached() -> tuple[CachedBase, ...]:
    """The quantised bases on disk, the one used last first."""
    found = [_describe(path.parent) for path in find_cache().glob(f"*/{ENTRY}") if not path.parent.name.startswith(".")]
    return tuple(sorted(found, key=lambda cached: -cached.last_used))


def clear_cached(base: str | None = None) -> tuple[CachedBase, ...]:
    """Removes the quantised bases made of `base`, or all of them, but for those being written; they come back.

    A process that has one open keeps it until it ends: on POSIX a removed file lives as long as it is mapped. Locks
    stay: of a file that is removed while a process holds it, another would make a second lock.
    """
    from filelock import Timeout

    removed = []
    for cached in list_cached():
        if base in (None, cached.base):
            with contextlib.suppress(Timeout), _lock(cached.folder).acquire(blocking=False):
                shutil.rmtree(cached.folder)
                removed.append(cached)
    if base is None:
        for draft in find_cache().glob(".*.partial"):  # of processes that were killed while they wrote
            owner = draft.with_name(draft.name.split(".")[1])
            with contextlib.suppress(Timeout), _lock(owner).acquire(blocking=False):
                shutil.rmtree(draft, ignore_errors=True)
    return tuple(removed)


def _lock(folder: Path) -> BaseFileLock:
    """What is held by the process that makes the base in `folder`."""
    from filelock import FileLock

    return FileLock(folder.with_suffix(".lock"))


def _is_cacheable(identity: BaseIdentity, config: BitsAndBytesConfig, options: dict[str, Any]) -> bool:
    """Whether stored weights would be the whole model, and its files all that it is made of.

    Not so where ZeRO-3 shards them, where they are quantised already, with code beside, or another config given.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    plain = read_stored(identity.folder) is None and not options.get("trust_remote_code") and "config" not in options
    return bool(config.load_in_4bit) and plain and not is_deepspeed_zero3_enabled()


def _key(auto_class: Any, identity: BaseIdentity, config: BitsAndBytesConfig, options: dict[str, Any]) -> str:
    """The name of a base's folder in the cache.

    The fingerprint reads samples of the weights; size and time of the files tell a base that was edited in place.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in list_weight_files(identity.folder)]
    versions = [importlib.metadata.version(name) for name in ("transformers", "bitsandbytes")]
    made_of = [FORMAT_VERSION, auto_class.__name__, identity.fingerprint, identity.revision, files, versions]
    return hash_json([*made_of, config.to_dict(), options.get("dtype")])[:32]


def _read(auto_class: Any, folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """The model in `folder`, or None where there is none or it is damaged."""
    try:
        expected = json.loads((folder / ENTRY).read_text(encoding="utf-8"))["checksums"]
        with ThreadPoolExecutor(1) as other, garbage_kept():
            checksums = other.submit(_checksums, folder)
            found = _load(auto_class, folder, options)
            if checksums.result() != expected:
                return None
        os.utime(folder / ENTRY)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _load(auto_class: Any, folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """What transformers reads in `folder`, or None where it cannot; damage shows in many ways."""
    from safetensors import SafetensorError

    try:
        return auto_class.from_pretrained(folder, **options, output_loading_info=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError):
        return None


def _store(
    auto_class: Any,
    made: tuple[PreTrainedModel, dict[str, Any]],
    folder: Path,
    identity: BaseIdentity,
    config: BitsAndBytesConfig,
    options: dict[str, Any],
) -> bool:
    """Writes what was made to `folder` in one step, unless it is not whole or the disk cannot take it; says whether."""
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    model, info = made
    free = shutil.disk_usage(folder.parent).free
    if info["missing_keys"] or free < model.get_memory_footprint() + SPARE_BYTES:
        return False
    generation = model.generation_config
    try:
        with whole_folder(folder) as draft:
            model.generation_config = GenerationConfig()  # a base's own may be one that transformers refuses to write
            model.save_pretrained(draft)
            (draft / "generation_config.json").unlink(missing_ok=True)
            if (identity.folder / "generation_config.json").is_file():
                shutil.copyfile(identity.folder / "generation_config.json", draft / "generation_config.json")
            entry = {
                "base": identity.name,
                "revision": identity.revision,
                "quantization": config.to_diff_dict(),
                "checksums": _checksums(draft),
            }
            (draft / ENTRY).write_text(json.dumps(entry, indent=2, default=str), encoding="utf-8")
            again = _load(auto_class, draft, {**options, "device_map": {"": "cpu"}})
            if again is None or not _is_same(model, again[0]):
                raise OSError(f"{draft} does not hold what was written there")
        return True
    except (OSError, SafetensorError):  # safetensors has an error of its own for a full disk
        return False
    finally:
        model.generation_config = generation


def _is_same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether all weights, what they are quantised by, and all buffers are the same, bit for bit."""
    import torch

    first, second = ({**dict(each.named_buffers()), **each.state_dict()} for each in (model, other))
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(_bits(tensor), _bits(second[name]))
        for name, tensor in first.items()
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, on the CPU; packed 4-bit weights may read as NaN, which equals nothing."""
    import torch

    return tensor.detach().cpu().flatten().view(torch.uint8)


def _checksums(folder: Path) -> dict[str, str]:
    """A checksum of every file but the entry: XXH3, five times as fast as SHA-256, as nobody forges these."""
    return dict(sorted((path.name, _checksum(path)) for path in folder.iterdir() if path.name != ENTRY))


def _checksum(path: Path) -> str:
    import xxhash

    digest, chunk = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while length := stream.readinto(chunk):
            digest.update(chunk[:length])
    return digest.hexdigest()


def _describe(folder: Path) -> CachedBase:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    last_used = (folder / ENTRY).stat().st_mtime
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        return CachedBase(folder, entry["base"], entry["revision"], entry["quantization"], num_bytes, last_used)
    except (ValueError, KeyError, TypeError):
        return CachedBase(folder, "(damaged)", None, {}, num_bytes, last_used)
