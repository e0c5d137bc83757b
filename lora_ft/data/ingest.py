"""Sources become Examples in one Arrow file, and a few numbers a row that the deal needs."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from lora_ft.data.example import Example
from lora_ft.data.privacy import redact_example
from lora_ft.data.sources import Source, Usage, read_examples
from lora_ft.data.split import OPEN, SPLITS, RowIndex
from lora_ft.data.store import ExampleFile, chunked
from lora_ft.errors import Fault, UserError
from lora_ft.sections import DataSection

MAX_FAULTS = 20
"""Faults that are shown; reading stops there where bad rows are refused."""
FOLDED = bytes(ord(" " if chr(n).isspace() else chr(n).lower()) if n < 128 else n for n in range(256))
"""ASCII characters in lower case, white space as a space; other bytes as they are."""


class FaultList:
    """Bad rows: collected for one error message, or counted and skipped."""

    def __init__(self, section: DataSection):
        self._refuses = section.on_bad_row == "refuse"
        self.count = 0
        self.first: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """One more bad row."""
        self.count += 1
        if len(self.first) < MAX_FAULTS:
            self.first.append(fault)
        elif self._refuses:
            self.raise_refused("… and more bad rows")

    @property
    def is_refused(self) -> bool:
        """Whether the rows will be refused, whatever else is found."""
        return self._refuses and self.count > 0

    def raise_refused(self, place: str = "") -> None:
        """Nothing where bad rows are skipped or there are none; otherwise one error with the first of them."""
        if self.is_refused:
            hint = Fault(place or f"{self.count} bad rows", None, "", "To leave them out, set data.on_bad_row: skip.")
            raise UserError.of([*self.first, hint])


class Ingest:
    """Rows of all sources on their way in: each becomes an Example on disk, and a few numbers in memory."""

    def __init__(self, sources: Sequence[Source], section: DataSection, is_chat: bool, faults: FaultList):
        """Bad rows go to `faults`. With `is_chat` questions and answers become conversations, otherwise plain text."""
        self._sources, self._section, self._is_chat, self._faults = sources, section, is_chat, faults
        self._keys = array("Q"), array("Q"), array("Q")
        """Hashes of each row's first question, first exchange and whole text."""
        self._labels, self._numbers = array("i"), array("i")
        self.class_numbers: dict[str | None, int] = {}
        """Classes, numbered as they are met; None where a row has none."""
        self.num_skipped = 0
        """Bad rows."""
        self.redacted: Counter[str] = Counter()
        """Stretches of private data that were masked, by kind."""
        self.usage = Usage()
        """What rows were read as."""

    def read_chunks(self, path: Path) -> Iterator[list[Example]]:
        """The Examples, CHUNK_ROWS at a time, when they are in the file `path`; none any more once rows are refused."""
        with ExampleFile.open_writer(path) as writer:
            for chunk in chunked(self._read_good()):
                writer.write([line for _, _, line in chunk])
                for number, example, _ in chunk:
                    for keys, key in zip(self._keys, hash_example(example), strict=True):
                        keys.append(key)
                    self._labels.append(self.class_numbers.setdefault(example.label, len(self.class_numbers)))
                    self._numbers.append(number)
                if not self._faults.is_refused:
                    yield [example for _, example, _ in chunk]

    def order_classes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """For each of `class_numbers` the number in the order of names (-1 for none); and the names."""
        ordered = tuple(sorted((name for name in self.class_numbers if name is not None), key=_label_order))
        numbers = {name: number for number, name in enumerate(ordered)}
        return np.array([numbers.get(name or "", -1) for name in self.class_numbers], dtype=np.int32), ordered

    def build_index(self, order: np.ndarray) -> RowIndex:
        """What the deal needs to know of the rows that were read; `order` is that of their classes."""
        fixed = np.array([find_fixed(source) for source in self._sources], dtype=np.int8)
        questions, exchanges, texts = map(np.asarray, self._keys)
        labels, sources = order[np.asarray(self._labels)], np.asarray(self._numbers)
        return RowIndex(questions, exchanges, texts, labels, sources, fixed[sources])

    def _read_good(self) -> Iterator[tuple[int, Example, bytes]]:
        """The number of its source, each Example, and its JSON; Faults, and Examples that have no JSON, are counted."""
        for number, source in enumerate(self._sources):
            for item in read_source(source, self._section, self._is_chat, self.redacted, self.usage):
                if isinstance(item, Fault):
                    self._skip(item)
                    continue
                try:
                    yield number, item, item.to_json()
                except TypeError as error:
                    rule = f"The row holds what is neither text nor JSON: {error}."
                    self._skip(Fault(item.place, None, rule, "Write it as text."))

    def _skip(self, fault: Fault) -> None:
        self.num_skipped += 1
        self._faults.add(fault)


def find_fixed(source: Source) -> int:
    """The split that the recipe gives to a source, or OPEN."""
    return OPEN if source.section.split is None else SPLITS.index(source.section.split)


def read_source(
    source: Source, section: DataSection, is_chat: bool, redacted: Counter[str], usage: Usage
) -> Iterator[Example | Fault]:
    """The Examples of one source, redacted where the recipe says so; `redacted` and `usage` are counted on."""
    format_name = "classification" if section.task == "classification" else source.section.format
    found = read_examples(source, format_name, is_chat and section.task == "sft", usage)
    if not section.redact:
        return found
    return (item if isinstance(item, Fault) else redact_example(item, redacted) for item in found)


def hash_example(example: Example) -> tuple[int, int, int]:
    """64-bit hashes of the first question, of it and its answer, and of all text, that see no case and white space."""
    asked, answered, rest = example.parts
    question = xxhash.xxh3_64_intdigest(_normalise(asked))
    exchange = xxhash.xxh3_64_intdigest(_normalise(answered), seed=question)
    return question, exchange, xxhash.xxh3_64_intdigest(_normalise(rest), seed=exchange) if rest else exchange


def _normalise(text: str) -> bytes:
    """The text in lower case, with one space for any white space, and none around it."""
    if not text.isascii():
        return " ".join(text.split()).casefold().encode()
    folded = text.encode().translate(FOLDED)  # the same for ASCII, without a string for every word
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    return folded.strip()


def _label_order(name: str) -> tuple[bool, int, str]:
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)
