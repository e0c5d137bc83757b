"""A planned merge carried out: read a block of rows, change it, write it; nothing larger is ever in memory.

Every file's header, and so every tensor's offset, is known before the first byte is computed. Workers can therefore
take tensors in any order, and a merge that was killed goes on where it stood.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import RunFailed
from lora_ft.export.checkpoint import (
    Place,
    StoredTensor,
    count_elements,
    extremes,
    read_stored,
    read_values,
    torch_dtype,
)
from lora_ft.export.merge_plan import MergedTensor
from lora_ft.export.packed import unpack
from lora_ft.export.requantize import round_trip
from lora_ft.export.scratch import SCRATCH
from lora_ft.export.updates import KINDS, Block
from lora_ft.fingerprint import start_digest, sync_path

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 19
"""Elements of a piece: 2 MB in fp32, enough that workers seldom wait for each other's Python between two of them."""
TILE_ROWS = 64
"""Pieces start at a multiple of this many rows, so that the matrix product cuts them into the same tiles as it would
cut the whole weight, and rounds alike."""
ALIGNMENT = 8
"""safetensors pads its header to a multiple of this."""
JOURNAL_NAME = "journal.jsonl"
SYNC_BYTES = 1 << 26
"""How much is written before it is forced to disk and entered in the journal; at most this is done twice."""


def write_merged(tensors: Sequence[MergedTensor], folder: Path, workers: int | None = None) -> dict[str, str]:
    """The planned tensors, written to safetensors files in `folder`; returned is the BLAKE3 of each tensor's bytes.

    Tensors that the journal in `folder` says are done are left alone.

    Raises:
        RunFailed: a merged value is not finite in the type it is stored in.
    """
    offsets = lay_out_files(tensors, folder)
    whole = threading.Lock()
    with Journal(folder) as journal, ThreadPoolExecutor(workers or os.cpu_count(), initializer=one_thread_each) as pool:
        todo = [tensor for tensor in tensors if tensor.name not in journal.done]
        jobs = {pool.submit(write_tensor, tensor, folder, offsets[tensor.name], whole): tensor for tensor in todo}
        try:
            for job in as_completed(jobs):
                journal.enter(jobs[job], job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return journal.done


def one_thread_each() -> None:
    """Workers run side by side, so each computes on its own core."""
    import torch

    torch.set_num_threads(1)


def lay_out_files(tensors: Sequence[MergedTensor], folder: Path) -> dict[str, int]:
    """The merged files with header and full size, and where in its file each tensor's bytes start."""
    offsets = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        members = [tensor for tensor in tensors if tensor.file == file]
        header = render_header(members)
        offset = len(header)
        for tensor in members:
            offsets[tensor.name] = offset
            offset += tensor.num_bytes
        (folder / file).touch()
        with open(folder / file, "r+b") as stream:
            stream.write(header)
            stream.truncate(offset)
    return offsets


def render_header(tensors: Sequence[MergedTensor]) -> bytes:
    """What a safetensors file starts with: the length of its header, and the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        ends = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.source.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_tensor(tensor: MergedTensor, folder: Path, offset: int, whole: threading.Lock) -> str:
    """One tensor read, changed and written; returned is the BLAKE3 of its merged bytes.

    Args:
        offset: where its bytes start in the merged file.
        whole: held while a tensor is in memory in one piece, so that only one is at a time.
    """
    digest = start_digest()
    with (
        whole if tensor.needs_all else nullcontext(),
        open(tensor.source.path, "rb", buffering=0) as source,
        open(folder / tensor.file, "r+b", buffering=0) as target,
    ):
        target.seek(offset)
        held = read_held(tensor)
        for piece in split_tensor(tensor):
            value = piece.read(source, tensor.source) if held is None else piece.cut(held)
            merged = memoryview(merge_piece(value, tensor, piece.block).numpy())
            digest.update(merged)
            write_exactly(target, merged)
        if tensor.needs_all:
            SCRATCH.release()
    return digest.hexdigest()


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's elements that is in memory at one time."""

    first_element: int
    """Where it starts in the tensor."""
    shape: tuple[int, ...]
    """Its shape: rows first, or elements where the tensor is only copied or cast."""
    block: Block
    """The rows of the parameter it holds."""

    def read(self, stream: FileIO, stored: StoredTensor) -> torch.Tensor:
        """Its elements of a tensor whose file is open as `stream`."""
        into = SCRATCH.take("read", self.shape, torch_dtype(stored.dtype))
        return read_values(stream, stored, self.first_element, into)

    def cut(self, value: torch.Tensor) -> torch.Tensor:
        """Its elements of a tensor that is in memory."""
        return value.view(-1)[self.first_element :][: count_elements(self.shape)].view(self.shape)


def split_tensor(tensor: MergedTensor) -> Iterator[Piece]:
    """The tensor in pieces of about `BLOCK_ELEMENTS`; the last one takes what remains, so it is never a mere sliver."""
    shape = tensor.source.shape or (1,)
    kinds = [KINDS[update.kind] for update in tensor.updates]
    place = tensor.place or Place("")
    by_expert = any(kind.by_expert for kind in kinds) and place.expert is None
    experts, rows, *rest = shape if by_expert else (1, *shape)
    row_elements = count_elements(tuple(rest))
    step = max(1, BLOCK_ELEMENTS // max(1, row_elements) // TILE_ROWS) * TILE_ROWS
    starts = [0] if any(kind.whole for kind in kinds) else range(0, max(1, rows - step + 1), step)
    for expert in range(experts):
        for start, stop in itertools.pairwise((*starts, rows)):
            first = (expert * rows + start) * row_elements
            block = Block(place.first_row + start, place.first_row + stop, expert if by_expert else place.expert)
            yield Piece(first, (stop - start, *rest), block)


def merge_piece(value: torch.Tensor, tensor: MergedTensor, block: Block) -> torch.Tensor:
    """The merged bytes [bytes] of one piece of a tensor, from its values before the merge."""
    import torch

    if tensor.updates:
        value = recast(value, torch.promote_types(value.dtype, torch.float32), "sum")
        for update in tensor.updates:
            value = KINDS[update.kind].apply(value, update, block)
    if not tensor.is_copy:
        value = checked(recast(value, torch_dtype(tensor.dtype), "merged"), tensor)
    return value.contiguous().view(-1).view(torch.uint8)


def recast(value: torch.Tensor, dtype: torch.dtype, role: str) -> torch.Tensor:
    """`value` in `dtype`, in the scratch memory of `role` if it has to move."""
    return value if value.dtype == dtype else SCRATCH.take(role, tuple(value.shape), dtype).copy_(value)


def read_held(tensor: MergedTensor) -> torch.Tensor | None:
    """The whole tensor as a quantised model holds it; None if the merge starts from the numbers as they are stored."""
    if tensor.source.parts:
        return unpack(tensor.source)
    if tensor.quantization is not None:
        return round_trip(read_stored(tensor.source), tensor.quantization)
    return None


def checked(value: torch.Tensor, tensor: MergedTensor) -> torch.Tensor:
    """`value`, which is finite.

    Raises:
        RunFailed: it is not.
    """
    if value.is_floating_point() and value.numel():
        low, high = extremes(value)
        if not (math.isfinite(low) and math.isfinite(high)):
            rule = f"The merged weight has values that are not finite, or too large for {tensor.dtype}."
            raise RunFailed(tensor.name, f"{low} … {high}", rule, "Merge with --dtype bfloat16 or float32.")
    return value


def write_exactly(stream: FileIO, data: memoryview) -> None:
    """`data` into a file, where it stands."""
    while data:
        data = data[stream.write(data) :]


class Journal:
    """Which tensors of a merge are safely on disk, with their hashes, so that a killed merge can go on."""

    def __init__(self, folder: Path):
        self.folder = folder
        """Where the merged files lie."""
        self.path = folder / JOURNAL_NAME
        """One line of JSON a tensor."""
        self.done = self.read_lines()
        """Tensor → BLAKE3 of its bytes."""
        self.pending: list[tuple[MergedTensor, str]] = []
        """Tensors that are written and not yet forced to disk, with their hashes."""

    def read_lines(self) -> dict[str, str]:
        """What an earlier run has finished; a last line that was cut off is dropped."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        self.path.write_text(whole, encoding="utf-8")
        return dict(json.loads(line) for line in whole.splitlines())

    def enter(self, tensor: MergedTensor, digest: str) -> None:
        """`tensor` is written."""
        self.pending.append((tensor, digest))
        if sum(tensor.num_bytes for tensor, _ in self.pending) >= SYNC_BYTES:
            self.commit()

    def commit(self) -> None:
        """What is pending is forced to disk first, and entered in the journal then."""
        for file in {tensor.file for tensor, _ in self.pending}:
            sync_path(self.folder / file)
        lines = {tensor.name: digest for tensor, digest in self.pending}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines.items())
            stream.flush()
            os.fsync(stream.fileno())
        self.done |= lines
        self.pending = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.commit()
