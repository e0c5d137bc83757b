"""JSON files become rows one by one, with the line each starts on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from lora_ft.data.files import MAX_ROW_CHARACTERS, Row, Rows, open_text
from lora_ft.errors import UserError

CHUNK_CHARACTERS = 1 << 20


def read_json(path: Path) -> Rows:
    """An array of objects or several, an object that holds one such array, or one object a line.

    Elements are decoded one by one as the text comes in; parsing the whole would hold it in memory, and know no lines.
    """
    with open_text(path) as stream:
        scanner = JsonScanner(stream, path)
        if scanner.peek() == "[":
            while scanner.take("["):
                yield from _read_elements(scanner)
            if scanner.peek():
                raise scanner.error("Behind an array of rows stands what is no array.")
        elif scanner.peek():
            first = Row(f"{path}:{scanner.line}", scanner.value())
            if scanner.peek() or not (array := _find_array(first.fields)):
                yield first
                while scanner.peek():
                    yield Row(f"{path}:{scanner.line}", scanner.value())
            else:
                yield from (Row(f"{path}:{number}", fields) for number, fields in enumerate(array, 1))


def _read_elements(scanner: JsonScanner) -> Rows:
    while not scanner.take("]"):
        if not scanner.peek():
            raise scanner.error("The array does not end.")
        yield Row(f"{scanner.path}:{scanner.line}", scanner.value())
        if not scanner.take(",") and scanner.peek() not in ("]", ""):
            raise scanner.error("A comma is missing between two rows.")


def _find_array(value: Any) -> list | None:
    """The rows of a file that wraps them in an object: `{"version": 1, "data": [{…}, …]}`."""
    arrays = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    is_rows = len(arrays) == 1 and all(isinstance(row, dict) for row in arrays[0])
    return arrays[0] if is_rows and not {"messages", "conversations", "tools"}.intersection(value) else None


class JsonScanner:
    """A text stream taken apart into JSON values, with the line that comes next."""

    def __init__(self, stream: io.TextIOWrapper, path: Path):
        self.path = path
        self.line = 1
        """Line of the next character that is not white space; right after `peek`."""
        self._stream, self._decoder = stream, json.JSONDecoder()
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not white space, which is passed over; empty at the end."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and not rest.isspace():
                return rest
            if rest:
                self.line += rest == "\n"
                self._at += 1
            elif not self._read_more():
                return ""

    def take(self, character: str) -> bool:
        """Whether `character` comes next; if so, it is passed over."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated")
                if not (is_cut and len(self._text) < MAX_ROW_CHARACTERS and self._read_more()):
                    self.line += self._text.count("\n", self._at, error.pos)
                    raise self.error(f"This is not JSON: {error.msg}.") from None
            except RecursionError:
                raise self.error("Values are nested too deep.") from None
            except ValueError:
                raise self.error("A number has more digits than Python reads (4,300).") from None
        self.line += self._text.count("\n", self._at, end)
        self._at = end
        return value

    def error(self, rule: str) -> UserError:
        """An error at the line reached."""
        return UserError(f"{self.path}:{self.line}", None, rule, "Mend the file, or write one object a line (.jsonl).")

    def _read_more(self) -> bool:
        rest = self._text[self._at :]
        chunk = self._stream.read(max(CHUNK_CHARACTERS, len(rest)))
        self._text, self._at = rest + chunk, 0
        return bool(chunk)
