"""Sources become Examples in one Arrow file, and a few numbers a row that the deal needs."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from lora_ft.data.example import Example
from lora_ft.data.privacy import redact_example
from lora_ft.data.sources import Source, read_examples
from lora_ft.data.split import OPEN, SPLITS, RowIndex
from lora_ft.data.store import ExampleFile, chunked
from lora_ft.errors import Fault, UserError
from lora_ft.sections import DataSection

MAX_FAULTS = 20
"""Faults that are shown; reading stops there where bad rows are refused."""


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

    def raise_refused(self, place: str = "") -> None:
        """Nothing where bad rows are skipped or there are none; otherwise one error with the first of them."""
        if self._refuses and self.count:
            hint = Fault(place or f"{self.count} bad rows", None, "", "To leave them out, set data.on_bad_row: skip.")
            raise UserError.of([*self.first, hint])


@dataclass(frozen=True)
class Ingested:
    """What is known of the rows that became Examples."""

    index: RowIndex
    """What the deal needs, one entry a row."""
    labels: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""
    redacted: Counter[str] = field(default_factory=Counter)
    """Stretches of private data that were masked, by kind."""


def write_examples(
    path: Path, sources: Sequence[Source], section: DataSection, is_chat: bool, faults: FaultList
) -> Ingested:
    """All rows of all sources as Examples in the file `path`; bad rows go to `faults`.

    With `is_chat` questions and answers become conversations, otherwise plain text.
    """
    questions, texts, labels, numbers = array("Q"), array("Q"), array("i"), array("i")
    names: dict[str | None, int] = {}
    redacted: Counter[str] = Counter()
    good = (
        (number, example, line)
        for number, source in enumerate(sources)
        for example, line in keep_good(read_source(source, section, is_chat, redacted), faults)
    )
    with ExampleFile.open_writer(path) as writer:
        for chunk in chunked(good):
            writer.write([line for _, _, line in chunk])
            for number, example, _ in chunk:
                question, text = hash_example(example)
                questions.append(question)
                texts.append(text)
                labels.append(names.setdefault(example.label, len(names)))
                numbers.append(number)
    codes, ordered = order_labels(names)
    fixed = np.array([find_fixed(source) for source in sources], dtype=np.int8)
    keys, sources_of_rows = (np.array(questions), np.array(texts)), np.array(numbers)
    index = RowIndex(*keys, codes[np.array(labels)], sources_of_rows, fixed[sources_of_rows])
    return Ingested(index, ordered, redacted)


def find_fixed(source: Source) -> int:
    """The split that the recipe gives to a source, or OPEN."""
    return OPEN if source.section.split is None else SPLITS.index(source.section.split)


def order_labels(names: Mapping[str | None, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """For each label in the order of its first row its number in the order of names (-1 for none); and the names."""
    ordered = tuple(sorted((name for name in names if name is not None), key=_label_order))
    numbers = {name: number for number, name in enumerate(ordered)}
    return np.array([numbers.get(name or "", -1) for name in names], dtype=np.int32), ordered


def read_source(
    source: Source, section: DataSection, is_chat: bool, redacted: Counter[str]
) -> Iterator[Example | Fault]:
    """The Examples of one source, redacted where the recipe says so."""
    format_name = "classification" if section.task == "classification" else source.section.format
    found = read_examples(source, format_name, is_chat and section.task == "sft")
    if not section.redact:
        return found
    return (item if isinstance(item, Fault) else redact_example(item, redacted) for item in found)


def keep_good(found: Iterable[Example | Fault], faults: FaultList) -> Iterator[tuple[Example, bytes]]:
    """The Examples with their JSON; Faults go to `faults`, and Examples that have no JSON."""
    for item in found:
        if isinstance(item, Fault):
            faults.add(item)
            continue
        try:
            yield item, item.to_json()
        except TypeError as error:
            rule = f"The row holds what is neither text nor JSON: {error}."
            faults.add(Fault(item.place, None, rule, "Write it as text."))


def hash_example(example: Example) -> tuple[int, int]:
    """64-bit hashes of the question, and of question and answer, that do not see case and white space."""
    question = xxhash.xxh3_64_intdigest(_normalise(example.question))
    return question, xxhash.xxh3_64_intdigest(_normalise(example.reference), seed=question)


def _normalise(text: str) -> bytes:
    return " ".join(text.split()).casefold().encode()


def _label_order(name: str) -> tuple[bool, int, str]:
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)
