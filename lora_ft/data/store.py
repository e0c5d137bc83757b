"""Arrow files that Examples and tokens lie in on disk, written chunk by chunk and read without loading them.

Examples lie in an Arrow file of equal chunks, so that a row's chunk is known from its number. Tokens lie in an Arrow
stream, which `datasets` maps into memory as its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from lora_ft.data.example import Example

CHUNK_ROWS = 1000
TOKENS = pa.list_(pa.int32())
"""A list of token ids, labels or lengths."""


class ArrowWriter:
    """A file that rows are appended to, column-wise and chunk by chunk."""

    def __init__(self, path: Path, schema: pa.Schema, as_stream: bool = True):
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._chunks = (pa.ipc.new_stream if as_stream else pa.ipc.new_file)(self._file, schema)
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> ArrowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._chunks.close()
        self._file.close()

    def write(self, *columns: Sequence[Any]) -> None:
        """One chunk; `columns` as in the schema."""
        if len(columns[0]):
            arrays = [_to_arrow(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
            self.append(pa.record_batch(arrays, schema=self._schema))

    def append(self, chunk: pa.RecordBatch) -> None:
        """One chunk that Arrow has already; a small one waits for others, since each that is mapped costs a page."""
        self._waiting.append(chunk)
        if sum(waiting.num_rows for waiting in self._waiting) >= CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._chunks.write_batch(pa.concat_batches(self._waiting))
        self._waiting = []


def _to_arrow(column: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """A column as Arrow has it; lists of integers by way of one flat array, which is four times as fast."""
    if not pa.types.is_list(kind):
        return pa.array(column, kind)
    offsets = np.cumsum([0, *map(len, column)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(column), dtype=np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class TokenRows:
    """Rows of a token file by number, mapped from disk."""

    def __init__(self, path: Path):
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        self._columns = reader.schema.names
        self._chunks = list(reader)
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in self._chunks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read_lists(self, row: int) -> list[np.ndarray]:
        """The row's lists of integers, one a column, without a copy."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        at = row - int(self._starts[number])
        return [column[at].values.to_numpy() for column in self._chunks[number].columns]

    def document_lengths(self) -> np.ndarray:
        """The length of every document in tokens, in packed rows too; int64."""
        if "seq_lengths" not in self._columns:
            return self.row_lengths()
        parts = [chunk.column("seq_lengths").flatten().to_numpy() for chunk in self._chunks]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def row_lengths(self) -> np.ndarray:
        """The length of every row in tokens; int64."""
        parts = [np.diff(chunk.column("input_ids").offsets.to_numpy()) for chunk in self._chunks]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def largest_token(self) -> int:
        """The largest token id, of inputs and labels; -1 where there is no row."""
        lists = [column for chunk in self._chunks for column in chunk.columns[:2] if pa.types.is_list(column.type)]
        return max((int(column.flatten().to_numpy().max(initial=-1)) for column in lists), default=-1)


class ExampleFile:
    """Examples in one file, written once in order and read by number."""

    def __init__(self, path: Path, mapped: bool = True):
        """With `mapped`, rows are read in any order; without, in order and with no more memory than one chunk."""
        source = pa.memory_map(str(path)) if mapped else pa.OSFile(str(path))
        self._reader = pa.ipc.open_file(source)
        self._number = -1
        self._chunk: Any = None

    def __getitem__(self, row: int) -> Example:
        number, at = divmod(row, CHUNK_ROWS)
        if number != self._number:
            self._number, self._chunk = number, self._reader.get_batch(number).column(0)
        return Example.from_json(self._chunk[at].as_py())

    @staticmethod
    def open_writer(path: Path) -> ArrowWriter:
        """A writer that takes lines of JSON, CHUNK_ROWS at a time."""
        return ArrowWriter(path, pa.schema({"example": pa.large_binary()}), as_stream=False)


class StoredExamples(Sequence[Example]):
    """Some of the Examples in a file, read when they are asked for."""

    def __init__(self, file: ExampleFile, rows: np.ndarray):
        self._file, self._rows = file, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> StoredExamples: ...
    def __getitem__(self, index: int | slice) -> Example | StoredExamples:
        if isinstance(index, slice):
            return StoredExamples(self._file, self._rows[index])
        return self._file[int(self._rows[index])]


def chunked(items: Iterable[Any], size: int = CHUNK_ROWS) -> Iterator[list[Any]]:
    """The items in lists of `size`."""
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
