"""Files become rows, one function a kind of file; text stays the text it is, with no types guessed from it.

Rows stream: memory does not grow with the file. A row that cannot be read comes as a Fault in its place; a file that
cannot be read raises.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import orjson

from lora_ft.data.fields import shorten
from lora_ft.data.files import MAX_ROW_CHARACTERS, Row, Rows, drop_fillers, iterate_lines
from lora_ft.data.json_stream import read_json
from lora_ft.data.tables import read_csv, read_tsv
from lora_ft.errors import Fault, UserError
from lora_ft.recipe_paths import COMPRESSIONS, split_suffixes

PARQUET_ROWS = 1000


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffixes (`.jsonl`, `.csv.gz` …).

    Raises:
        UserError: the file is missing, damaged, or of a kind that is not read.
    """
    kind, _ = split_suffixes(path)
    if kind is None:
        rule = f"Files are read by suffix: {', '.join(READERS)}, also with {', '.join(COMPRESSIONS)} behind it."
        raise UserError(str(path), None, rule, "Rename or convert the file.")
    try:
        if path.stat().st_size == 0:
            raise UserError(str(path), None, "The file is empty.", "Write rows into it, or leave it out.")
        yield from READERS[kind](path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(str(path), None, f"The file cannot be read: {error}.", "Check the path and the file.") from None


def read_jsonl(path: Path) -> Rows:
    """One JSON object a line."""
    for number, line in iterate_lines(path):
        place = f"{path}:{number}"
        try:
            yield Row(place, orjson.loads(line))
        except orjson.JSONDecodeError as error:
            found = shorten(line.decode("utf-8", "backslashreplace").strip())
            rule, fix = f"The line is not JSON: {error}.", "Write one object a line, in UTF-8."
            if len(line) >= MAX_ROW_CHARACTERS:
                rule, fix = f"The line has {MAX_ROW_CHARACTERS:,} characters or more.", "Divide the row."
            yield Fault(place, found, rule, fix)


def read_parquet(path: Path) -> Rows:
    """Columns of a Parquet file, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            batches = (row for batch in table.iter_batches(PARQUET_ROWS) for row in batch.to_pylist())
            for number, fields in enumerate(batches, 1):
                yield Row(f"{path}:{number}", drop_fillers(fields))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise OSError(error) from None


def read_text(path: Path) -> Rows:
    """One text a line."""
    for number, line in iterate_lines(path):
        text = line.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 becomes a fault of its row
        yield Row(f"{path}:{number}", {"text": text.rstrip("\r\n")})


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
"""How each kind of file is read."""
