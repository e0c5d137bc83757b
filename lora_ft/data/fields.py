"""What a single field of a row may hold, and how a field that holds something else is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from lora_ft.errors import Fault

Fields = Mapping[str, Any]


class BadRow(Exception):
    """A row that does not fit its format: which field, what stands there, what should, and how to mend it."""

    def __init__(self, field: str, value: object, rule: str, fix: str):
        super().__init__(rule)
        self.field, self.value, self.rule, self.fix = field, value, rule, fix

    def at(self, place: str) -> Fault:
        """The fault a user sees."""
        return Fault(f"{place}  {self.field}".rstrip(), shorten(self.value), self.rule, self.fix)


def shorten(value: object, width: int = 80) -> str | None:
    """A value on one line, cut to `width` characters, for a message."""
    if value is None:
        return None
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def require_text(fields: Fields, name: str, where: str = "") -> str:
    """The text in `fields[name]`, which must not be blank."""
    text = read_text(fields, name, where)
    if not text.strip():
        fix = "Fill it, or leave such rows out (data.on_bad_row: skip)."
        raise BadRow(where + name, None, "The field is empty.", fix)
    return text


def read_text(fields: Fields, name: str, where: str = "") -> str:
    """The text in `fields[name]`; empty where the field is missing or null."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        found = f"{value!r} ({type(value).__name__})"
        raise BadRow(where + name, found, "The field must be text.", "Put it in quotes.")
    check_unicode(value, where + name)
    return value


def check_unicode(text: str, field: str) -> None:
    """Nothing for text that can be written as UTF-8; a BadRow for lone surrogates, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"Character {error.start + 1} is half a character (a lone surrogate), or a byte that is not UTF-8."
        raise BadRow(field, text, rule, "Write the file again as UTF-8.") from None


def read_json_field(value: Any, field: str) -> Any:
    """A value that may come as JSON in a text (as tools and arguments do in files with typed columns)."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise BadRow(field, value, f"The text is not JSON: {error}.", "Write an object or an array.") from None
