"""Files opened as text, compressed or not, and the rows that are read from them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import Fault

MAX_ROW_CHARACTERS = 1 << 26
"""Longest row that is read; a longer one is a file of another kind, and would fill memory."""
BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Byte order marks, and the encodings they stand for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its file has it."""

    place: str
    """`file:line`; in files without lines the number of the row."""
    fields: Any
    """Columns by name, in every readable row of a good file."""


Rows = Iterator[Row | Fault]


def drop_fillers(fields: dict[str, Any]) -> dict[str, Any]:
    """A row of typed columns without the nulls that fill up the objects inside a column to one set of keys."""
    return {name: _drop_nulls(value) for name, value in fields.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A text file, compressed or not, as UTF-8 or what its byte order mark says.

    Bytes that are not UTF-8 come as lone surrogates, so that the row they stand in can be named.
    """
    stream, encoding = open_stream(path)
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=newline)


def open_stream(path: Path) -> tuple[Any, str]:
    """The bytes of a file, unpacked where it is compressed, and the encoding they have."""
    stream = OPENERS.get(path.suffix.lower(), open_plain)(path)
    start = stream.peek(4)
    return stream, next((name for mark, name in BOMS if start.startswith(mark)), "utf-8")


def open_plain(path: Path) -> io.BufferedReader:
    """The bytes of a file."""
    return path.open("rb")


def open_zstandard(path: Path) -> io.BufferedReader:
    """The bytes that a Zstandard file holds."""
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def iterate_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line in UTF-8) of every line that is not blank; one that is too long comes cut."""
    stream, encoding = open_stream(path)
    if encoding == "utf-8-sig":
        stream.read(3)  # what follows is read as bytes, so that a line with a bad one is a fault of that line
        encoding = "utf-8"
    lines: Any = stream if encoding == "utf-8" else io.TextIOWrapper(stream, encoding)
    with lines:
        number = 0
        while line := lines.readline(MAX_ROW_CHARACTERS):
            number += 1
            if not line.isspace():
                yield number, line if encoding == "utf-8" else line.encode()
            while len(line) == MAX_ROW_CHARACTERS and line[-1:] not in ("\n", b"\n"):
                line = lines.readline(MAX_ROW_CHARACTERS)


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": open_zstandard,
}
"""Suffixes of compressed files, and how each is opened."""
