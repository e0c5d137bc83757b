"""Tables in text files become rows: comma- and tab-separated values, with a line of names or without."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from lora_ft.data.fields import shorten
from lora_ft.data.files import MAX_ROW_CHARACTERS, Row, Rows, open_text
from lora_ft.errors import Fault, UserError

SNIFF_CHARACTERS = 1 << 20
SNIFF_ROWS = 1000
OTHER_SEPARATORS = (";", "\t", "|", ",")
"""What may stand between the names of a first line that seems to hold a single one."""


def read_csv(path: Path) -> Rows:
    """Comma-separated values as RFC 4180 has them, the names in the first line."""
    return _read_table(path, ",", csv.QUOTE_MINIMAL)


def read_tsv(path: Path) -> Rows:
    """Tab-separated values; quotes are characters like others unless the whole start of the file is quoted properly.

    SMS messages hold quotes that nobody closes. Read as RFC 4180 they swallow tabs and lines up to the next quote.
    """
    with open_text(path, newline="") as stream:
        start = stream.read(SNIFF_CHARACTERS)
    whole = start[: start.rfind("\n") + 1] or start
    return _read_table(path, "\t", csv.QUOTE_MINIMAL if _is_quoted(whole) else csv.QUOTE_NONE)


def _is_quoted(text: str) -> bool:
    if not (text.startswith('"') or '\t"' in text or '\n"' in text):
        return False
    try:
        return len({len(row) for row in csv.reader(io.StringIO(text), delimiter="\t", strict=True) if row}) == 1
    except csv.Error:
        return False


def _read_table(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Rows:
    csv.field_size_limit(MAX_ROW_CHARACTERS)
    with open_text(path, newline="") as stream:
        lines = _table_lines(path, csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True))
        sample = list(islice(lines, SNIFF_ROWS))
        columns = find_columns([cells for _, cells in sample if isinstance(cells, list)])
        named = chain(sample, lines) if columns else islice(chain(sample, lines), 1, None)
        header = columns or _read_header(path, sample)
        for place, cells in named:
            if isinstance(cells, Fault):
                yield cells
            elif len(cells) != len(header):
                rule = f"The row has {len(cells)} cells where the table has {len(header)} columns."
                yield Fault(place, shorten(delimiter.join(cells)), rule, "Quote cells that hold the separator.")
            else:
                yield Row(place, dict(zip(header, cells, strict=True)))


def _read_header(path: Path, sample: Sequence[tuple[str, list[str] | Fault]]) -> list[str]:
    cells = sample[0][1] if sample else []
    names = [] if isinstance(cells, Fault) else [name.strip() for name in cells]
    other = next((mark for mark in OTHER_SEPARATORS if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        rule = f"Its columns seem to be separated by {other!r}, and the suffix stands for another separator."
        raise UserError(f"{path}:1", names[0], rule, "Save it with commas as .csv, or with tabs as .tsv.")
    if len(set(names)) < len(names):
        rule = "Two columns have one name, so that one would hide the other."
        raise UserError(f"{path}:1", ", ".join(names), rule, "Rename one.")
    return names


def _table_lines(path: Path, reader: Any) -> Iterator[tuple[str, list[str] | Fault]]:
    """(place, cells) of each row, or its Fault.

    A quote that nobody closes takes in the lines up to the next one, or all that follow: how many rows these were is
    not known, so that they are not one bad row to be skipped.
    """
    while True:
        first = reader.line_num + 1
        place = f"{path}:{first}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            num_lines = reader.line_num + 1 - first
            if num_lines > 1:
                rule = f"A quote opened here takes in {num_lines:,} lines, {first} to {reader.line_num}: {error}."
                raise UserError(place, None, rule, 'Close it; a quote inside a cell is written twice ("").') from None
            yield place, Fault(place, None, f"The row cannot be read: {error}.", "Mend its quotes.")
            continue
        if cells:
            yield place, cells


def find_columns(rows: Sequence[Sequence[str]]) -> list[str] | None:
    """Names for a table without a header line, or None where the first row is one.

    Only one kind of table can go without: two columns, one of them with the same few words again and again, the first
    row's among them (`ham<TAB>text`). A header's word would stand in the first row only.
    """
    if len(rows) < 3 or any(len(row) != 2 for row in rows[:3]):
        return None
    columns = [[row[i] for row in rows if len(row) == 2] for i in range(2)]
    num_labels, num_texts = sorted(len(set(column)) for column in columns)
    labels = min(columns, key=lambda column: len(set(column)))
    is_labelled = labels[0] in labels[1:] and 1 < num_labels <= len(rows) // 2 and 2 * num_labels <= num_texts
    if not is_labelled:
        return None
    return ["label", "text"] if labels is columns[0] else ["text", "label"]
