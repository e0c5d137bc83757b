"""Hashes that tell two things apart, and folders that appear whole or not at all.

Everything here reads bytes only: no torch, no weights in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_ft.errors import UserError

CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 5
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")
"""Keys of a config.json that a mere re-save changes; they say nothing about the model."""


@dataclass(frozen=True)
class BaseIdentity:
    """A base model: how the user named it, where its files lie, and which weights those are."""

    name: str
    """As in the recipe: Hub id, folder, or `builtin:NAME`."""
    folder: Path
    """Where its config and safetensors files lie on this machine."""
    revision: str | None
    """Commit of a Hub base; None for a folder."""
    fingerprint: str
    """What `fingerprint_base` says of `folder`."""

    @property
    def loadable_name(self) -> str:
        """The name stock `from_pretrained` understands: the Hub id, or the folder as an absolute path."""
        return self.name if self.revision is not None else str(self.folder.absolute())

    @property
    def num_bytes(self) -> int:
        """Size of its weights on disk."""
        return sum(path.stat().st_size for path in list_weight_files(self.folder))


def identify_base(name: str, folder: Path, revision: str | None = None) -> BaseIdentity:
    """`name` with the fingerprint of the weights in `folder`.

    Raises:
        UserError: `folder` holds no safetensors weights.
    """
    return BaseIdentity(name, folder, revision, fingerprint_base(folder))


def read_json(path: Path, fix: str = "Copy it again from where it was made.") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), None, f"This is not JSON ({error}).", fix) from None
    if not isinstance(value, dict):
        raise UserError(str(path), type(value).__name__, "This file holds a JSON object.", fix)
    return value


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: object) -> str:
    """SHA-256 of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """The hash of every file below `folder`, by its path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def hash_tensors(path: Path) -> str:
    """SHA-256 of the tensors in a safetensors file: names, dtypes, shapes and bytes, in order of name.

    Two files with equal tensors hash alike whatever their metadata and layout, which a hash of the file would not.
    """
    digest = hashlib.sha256()
    header, data_start = read_safetensors_header(path)
    with open(path, "rb") as stream:
        for name in sorted(header):
            tensor = header[name]
            digest.update(f"{name}|{tensor['dtype']}|{tensor['shape']}|".encode())
            begin, end = tensor["data_offsets"]
            stream.seek(data_start + begin)
            for _ in range(begin, end, CHUNK_BYTES):
                digest.update(stream.read(min(CHUNK_BYTES, data_start + end - stream.tell())))
    return digest.hexdigest()


def start_digest() -> Any:
    """A BLAKE3 hash of bytes still to come, for tensors: as hard to forge as SHA-256, and several times as fast."""
    from blake3 import blake3

    return blake3()


def read_safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors a safetensors file declares (name → dtype, shape, data_offsets), and where their bytes start.

    Raises:
        UserError: the file is cut short, or is no safetensors file.
    Source: safetensors README, section "Format": 8 bytes little-endian length N, N bytes of JSON, then the data.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = dict(json.loads(stream.read(length) if 8 + length <= size else b""))
            header.pop("__metadata__", None)
            entries = [(tensor["dtype"], tensor["shape"], tensor["data_offsets"][1]) for tensor in header.values()]
            data_bytes = max((end for _, _, end in entries), default=0)
        except (ValueError, TypeError, KeyError, IndexError):
            rule = "This is not a safetensors file, or it is cut short."
            raise UserError(str(path), None, rule, "Fetch it again.") from None
    if 8 + length + data_bytes > size:
        declared = f"{8 + length + data_bytes} bytes declared, {size} there"
        raise UserError(str(path), declared, "The file is cut short.", "Fetch it again.")
    return header, 8 + length


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files that stock `from_pretrained` reads from `folder`: the single one, or those of the index.

    Raises:
        UserError: there are none, or one that the index names is missing, or not beside it.
    """
    is_sharded = (folder / INDEX_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file()
    names = read_weight_map(folder / INDEX_NAME) if is_sharded else [WEIGHTS_NAME]
    strange = [name for name in names if Path(name).name != name]
    if strange:
        rule = "An index names files beside it; what is written under such a name would lie elsewhere."
        raise UserError(str(folder / INDEX_NAME), strange[0], rule, "Do not use this model.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        rule = "A base is read from safetensors files; pickled weights could run code and are not opened."
        raise UserError(str(folder), f"{missing[0]} is missing", rule, "Download the safetensors files of this model.")
    return [folder / name for name in names]


def read_weight_map(path: Path) -> list[str]:
    """The files that an index names, in order.

    Raises:
        UserError: it names none.
    """
    weight_map = read_json(path).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(str(path), None, "An index names a file for each weight.", "Fetch it again.")
    return sorted(set(names))


def fingerprint_base(folder: Path) -> str:
    """A hash that tells two bases of one shape apart, from a few KiB a tensor instead of the whole weights.

    Read are the config, and of every tensor its name, dtype, shape, and five samples of 4 KiB spread over its bytes.
    A fine-tune of a base changes nearly every weight of the matrices it touches, so the samples differ; a full hash
    of 100 GB would take minutes to say the same. How the tensors are spread over files does not matter.

    Raises:
        UserError: `folder` holds no safetensors weights.
    """
    config = read_json(folder / "config.json")
    digest = hashlib.sha256(hash_json({k: v for k, v in config.items() if k not in VOLATILE_CONFIG_KEYS}).encode())
    with ExitStack() as stack:
        tensors: dict[str, tuple[BinaryIO, int, dict[str, Any]]] = {}
        for path in list_weight_files(folder):
            header, data_start = read_safetensors_header(path)
            stream: BinaryIO = stack.enter_context(open(path, "rb"))
            tensors |= {name: (stream, data_start, tensor) for name, tensor in header.items()}
        for name in sorted(tensors):
            source, data_start, tensor = tensors[name]
            digest.update(f"{name}|{tensor['dtype']}|{tensor['shape']}|".encode())
            begin, end = tensor["data_offsets"]
            for offset in sample_offsets(end - begin):
                source.seek(data_start + begin + offset)
                digest.update(source.read(min(SAMPLE_BYTES, end - begin - offset)))
    return digest.hexdigest()


def sample_offsets(num_bytes: int) -> list[int]:
    """Where samples of `SAMPLE_BYTES` start in `num_bytes`: spread evenly, the first and the last bytes among them."""
    last = max(0, num_bytes - SAMPLE_BYTES)
    return sorted({last * step // (SAMPLES_PER_TENSOR - 1) for step in range(SAMPLES_PER_TENSOR)})


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and vanishes when it does not.

    Files are synced to disk before the rename, so that after a power cut `target` is either whole or absent. An
    older folder of that name is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        publish_folder(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish_folder(draft: Path, target: Path) -> None:
    """`draft` becomes `target`, synced to disk; an older `target` is replaced."""
    sync_folder(draft)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.rename(target, old)
        os.rename(draft, target)
        shutil.rmtree(old)
    else:
        os.rename(draft, target)
    sync_path(target.parent)


def write_whole(path: Path, text: str) -> None:
    """A text file that is either as it was or as it shall be, whenever the power goes."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    draft.write_text(text, encoding="utf-8")
    sync_path(draft)
    os.replace(draft, path)
    sync_path(path.parent)


def sync_folder(folder: Path) -> None:
    """Every file and folder below `folder` forced to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """One file or folder forced to disk; folders cannot be opened for this on Windows, and need not be."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
