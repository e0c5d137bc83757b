"""Settings of the data section that do not go together, found before any row is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_ft.data.formats import FORMATS
from lora_ft.errors import Fault
from lora_ft.sections import DataSection, SourceSection


def check_section(section: DataSection) -> Iterator[Fault]:
    """All that keeps the section from being carried out."""
    yield from _check_numbers(section)
    yield from _check_task(section)
    for number, source in enumerate(section.sources):
        yield from _check_source(source, f"data.sources[{number}]", section.task)


def _check_numbers(section: DataSection) -> Iterator[Fault]:
    shares = section.split.validation, section.split.test
    if section.max_length < 2:
        yield Fault("data.max_length", section.max_length, "A row has room for at least 2 tokens.", "Write 1024, say.")
    if not (all(0 <= share < 1 for share in shares) and sum(shares) < 1):
        rule = "A share is 0 or more, and all shares together leave rows for training."
        yield Fault("data.split", f"{shares[0]} + {shares[1]}", rule, "Write 0.1 for a tenth.")
    if section.split.seed < 0:
        yield Fault("data.split.seed", section.split.seed, "A seed is not negative.", "Write 42, say.")


def _check_source(source: SourceSection, place: str, task: str) -> Iterator[Fault]:
    if source.format != "auto" and source.format not in FORMATS:
        rule = f"A format is auto, {', '.join(FORMATS)}."
        yield Fault(f"{place}.format", source.format, rule, "Choose one of them.")
    if not 0 < source.weight < math.inf:
        rule = "A weight is a number above 0."
        yield Fault(f"{place}.weight", source.weight, rule, "Leave the source out to take none of it.")
    if source.weight > 1 and source.split in ("validation", "test"):
        rule = f"Only rows to train on are repeated, and split: {source.split} holds none."
        yield Fault(f"{place}.weight", source.weight, rule, "Leave it out.")
    if task == "classification" and source.format not in ("auto", "classification"):
        rule = "Rows to classify have the format classification (text, label)."
        yield Fault(f"{place}.format", source.format, rule, "Map the columns with data.sources[].columns.")
    forms = [FORMATS[source.format]] if source.format in FORMATS else FORMATS.values()
    fields = sorted({field for form in forms for field in form.columns})
    for field in source.columns:
        if field not in fields:
            rule = f"This is no field of the format {source.format}: {', '.join(fields)}."
            yield Fault(f"{place}.columns", field, rule, "Write field of the format: column of the file.")


def _check_task(section: DataSection) -> Iterator[Fault]:
    """Fields that only some tasks have a use for; a setting is never ignored."""
    sft_only = {"packing": section.packing, "truncation: split": section.truncation == "split"}
    sft_only["train_on"] = section.train_on != "assistant"
    for name, is_set in sft_only.items():
        if is_set and section.task != "sft":
            yield Fault(f"data.{name}", None, f"It has no meaning for task {section.task}.", "Leave it out.")
    if section.max_target_length is not None and section.task != "seq2seq":
        rule = "Only an encoder-decoder base (task seq2seq) has answers of a length of their own."
        yield Fault("data.max_target_length", section.max_target_length, rule, "Use data.max_length.")
    elif section.max_target_length is not None and section.max_target_length < 1:
        rule = "An answer has at least one token."
        yield Fault("data.max_target_length", section.max_target_length, rule, "Write 128, say.")
