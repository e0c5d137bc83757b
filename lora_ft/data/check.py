"""Settings of the data section that do not go together, found before any row is read."""

from __future__ import annotations

from collections.abc import Iterator

from lora_ft.data.formats import FORMATS
from lora_ft.errors import Fault, raise_faults
from lora_ft.sections import DataSection


def check_section(section: DataSection) -> None:
    """Nothing for a section that can be carried out.

    Raises:
        UserError: with all faults.
    """
    raise_faults([*_check_sources(section), *_check_task(section)])


def _check_sources(section: DataSection) -> Iterator[Fault]:
    if section.max_length < 2:
        yield Fault("data.max_length", section.max_length, "A row has room for at least 2 tokens.", "Write 1024, say.")
    if section.split.validation + section.split.test >= 1:
        rule = "All shares together leave rows for training."
        yield Fault("data.split", f"{section.split.validation} + {section.split.test}", rule, "Write 0.1 for a tenth.")
    for number, source in enumerate(section.sources):
        place = f"data.sources[{number}]"
        if source.format != "auto" and source.format not in FORMATS:
            rule = f"A format is auto, {', '.join(FORMATS)}."
            yield Fault(f"{place}.format", source.format, rule, "Choose one of them.")
        if source.weight <= 0:
            rule = "A weight is above 0."
            yield Fault(f"{place}.weight", source.weight, rule, "Leave the source out to take none of it.")
        if section.task == "classification" and source.format not in ("auto", "classification"):
            rule = "Rows to classify have the format classification (text, label)."
            yield Fault(f"{place}.format", source.format, rule, "Map the columns with data.sources[].columns.")


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
