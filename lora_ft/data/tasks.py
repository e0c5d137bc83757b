"""What a row becomes for each task: running text with answers in it, a text with its class, a question and an answer.

sft              input_ids  BOS question answer EOS        labels  -100 -100 … answer EOS
classification   input_ids  BOS text                       labels  number of the class
seq2seq          input_ids  context question EOS           labels  answer EOS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from lora_ft.data.example import Example
from lora_ft.data.fitting import Fitted, fit_document, replace_context
from lora_ft.data.render import Document, Renderer
from lora_ft.data.store import TOKENS
from lora_ft.errors import Fault
from lora_ft.sections import DEFAULT_TARGET_LENGTH, DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(Protocol):
    """Turns Examples into documents that fit."""

    label_type: pa.DataType
    """Arrow type of a document's labels."""

    def fit(self, rows: Sequence[Example]) -> list[Fitted | Fault]:
        """What became of each row, or what is wrong with it."""


@dataclass(frozen=True)
class SftTask:
    """Text that goes on; labels are tokens, or IGNORE_INDEX."""

    renderer: Renderer
    section: DataSection
    label_type = TOKENS

    def fit(self, rows: Sequence[Example]) -> list[Fitted | Fault]:
        """Rendered rows within `max_length`."""
        return [
            document if isinstance(document, Fault) else fit_document(document, example, self.section, self.renderer)
            for example, document in zip(rows, self.renderer.render(rows), strict=True)
        ]


@dataclass(frozen=True)
class ClassificationTask:
    """A text, and the number of its class."""

    tokenizer: PreTrainedTokenizerBase
    section: DataSection
    class_numbers: Mapping[str | None, int]
    label_type = pa.int32()

    def fit(self, rows: Sequence[Example]) -> list[Fitted | Fault]:
        """Texts with the tokenizer's own special tokens, within `max_length`."""
        encoded = self.tokenizer([row.context for row in rows])["input_ids"]
        return [self._fit_row(row, ids) for row, ids in zip(rows, encoded, strict=True)]

    def _fit_row(self, row: Example, ids: list[int]) -> Fitted:
        is_long = len(ids) > self.section.max_length
        if is_long and self.section.truncation == "drop":
            return Fitted(())
        kept = cut_input(self.tokenizer, row.context, ids, self.section) if is_long else ids
        return Fitted((Document(kept, [self.class_numbers[row.label]], row.place),), is_truncated=is_long)


@dataclass(frozen=True)
class Seq2SeqTask:
    """A question that an encoder reads, and the answer that a decoder writes."""

    tokenizer: PreTrainedTokenizerBase
    section: DataSection
    label_type = TOKENS

    def fit(self, rows: Sequence[Example]) -> list[Fitted | Fault]:
        """Questions within `max_length` and answers within `max_target_length`, with the tokenizer's special tokens."""
        sources = self.tokenizer([row.prompt for row in rows])["input_ids"]
        targets = self.tokenizer(text_target=[row.completion for row in rows])["input_ids"]
        return [self._fit_row(*parts) for parts in zip(rows, sources, targets, strict=True)]

    def _fit_row(self, row: Example, source: list[int], target: list[int]) -> Fitted | Fault:
        if row.messages or not row.prompt:
            rule = "An encoder reads one question, so that a row has a prompt and a completion."
            return Fault(row.place, None, rule, "Use the format qa, alpaca or prompt_completion.")
        target_length = self.section.max_target_length or DEFAULT_TARGET_LENGTH
        is_long, is_cut = len(source) > self.section.max_length, len(target) > target_length
        if (is_long or is_cut) and self.section.truncation == "drop":
            return Fitted(())
        if is_long and self.section.truncation == "context":
            source = self._shorten_context(row, source)
        if len(source) > self.section.max_length:
            source = cut_input(self.tokenizer, row.prompt, source, self.section)
        document = Document(source, target[:target_length], row.place)
        return Fitted((document,), is_truncated=is_long or is_cut, is_answer_cut=is_cut)

    def _shorten_context(self, row: Example, source: list[int]) -> list[int]:
        while row.context and (excess := len(source) - self.section.max_length) > 0:
            keep = len(row.context) - max(1, excess * len(row.prompt) // len(source))
            row = replace_context(row, row.context[: max(0, keep)])
            source = self.tokenizer(row.prompt)["input_ids"]
        return source


def cut_input(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], section: DataSection) -> list[int]:
    """The tokens of a text that is too long, cut at its start or end, with the special tokens around it kept."""
    if section.truncation == "keep_end":
        num_begin = int(ids[0] in tokenizer.all_special_ids)
        return ids[:num_begin] + ids[len(ids) - section.max_length + num_begin :]
    return tokenizer(text, truncation=True, max_length=section.max_length)["input_ids"]


def build_task(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    class_numbers: Mapping[str | None, int],
) -> Task:
    """The task of a recipe; `class_numbers` holds the classes of all rows that are fitted."""
    if section.task == "classification":
        return ClassificationTask(tokenizer, section, class_numbers)
    if section.task == "seq2seq":
        return Seq2SeqTask(tokenizer, section)
    return SftTask(renderer, section)
