"""What a row becomes for each task: running text with answers in it, a text with its class, a question and an answer.

sft              input_ids  BOS question answer EOS        labels  -100 -100 … answer EOS
classification   input_ids  BOS text                       labels  number of the class
seq2seq          input_ids  context question EOS           labels  answer EOS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from lora_ft.data.example import Example
from lora_ft.data.fitting import Fitted, fit_document, replace_context
from lora_ft.data.pieces import find_frame
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


class WholeEncoder:
    """Tokenises whole texts with the tokenizer's own special tokens around each; several threads may share one.

    `tokenizer(text, truncation=True)` would leave truncation on for whatever another thread tokenises meanwhile.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        begin, end = find_frame(tokenizer)
        self._num_begin, self._num_end = len(begin), len(end)
        self._turn = Lock()
        """NLLB and mBART put other special tokens around answers, by a setting that all threads see."""

    def encode(self, texts: Sequence[str], as_answers: bool = False) -> list[list[int]]:
        """The ids of each text."""
        with self._turn:
            return self._tokenizer(**{"text_target" if as_answers else "text": list(texts)})["input_ids"]

    def cut(self, ids: list[int], limit: int, at_start: bool) -> list[int]:
        """At most `limit` tokens of a text, cut at its end or `at_start`, with the special tokens around it kept.

        whole      <s> a b c d </s>     limit 4
        at end     <s> a b </s>         at start     <s> c d </s>
        """
        end = len(ids) - self._num_end
        room = max(0, limit - self._num_begin - self._num_end)
        start = max(self._num_begin, end - room) if at_start else self._num_begin
        return ids[: self._num_begin] + ids[start : min(end, start + room)] + ids[end:]


@dataclass(frozen=True)
class ClassificationTask:
    """A text, and the number of its class."""

    encoder: WholeEncoder
    section: DataSection
    class_numbers: Mapping[str | None, int]
    label_type = pa.int32()

    def fit(self, rows: Sequence[Example]) -> list[Fitted | Fault]:
        """Texts with the tokenizer's own special tokens, within `max_length`."""
        encoded = self.encoder.encode([row.context for row in rows])
        return [self._fit_row(row, ids) for row, ids in zip(rows, encoded, strict=True)]

    def _fit_row(self, row: Example, ids: list[int]) -> Fitted:
        is_long = len(ids) > self.section.max_length
        if is_long and self.section.truncation == "drop":
            return Fitted(())
        kept = cut_input(self.encoder, ids, self.section)
        return Fitted((Document(kept, [self.class_numbers[row.label]], row.place),), is_truncated=is_long)


@dataclass(frozen=True)
class Seq2SeqTask:
    """A question that an encoder reads, and the answer that a decoder writes."""

    encoder: WholeEncoder
    section: DataSection
    label_type = TOKENS

    def fit(self, rows: Sequence[Example]) -> list[Fitted | Fault]:
        """Questions within `max_length` and answers within `max_target_length`, with the tokenizer's special tokens."""
        sources = self.encoder.encode([row.prompt for row in rows])
        targets = self.encoder.encode([row.completion for row in rows], as_answers=True)
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
        document = Document(cut_input(self.encoder, source, self.section), target[:target_length], row.place)
        return Fitted((document,), is_truncated=is_long or is_cut, is_answer_cut=is_cut)

    def _shorten_context(self, row: Example, source: list[int]) -> list[int]:
        while row.context and (excess := len(source) - self.section.max_length) > 0:
            keep = len(row.context) - max(1, excess * len(row.prompt) // len(source))
            row = replace_context(row, row.context[: max(0, keep)])
            (source,) = self.encoder.encode([row.prompt])
        return source


def cut_input(encoder: WholeEncoder, ids: list[int], section: DataSection) -> list[int]:
    """The tokens of a text within `max_length`."""
    if len(ids) <= section.max_length:
        return ids
    return encoder.cut(ids, section.max_length, at_start=section.truncation == "keep_end")


def build_task(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    class_numbers: Mapping[str | None, int],
) -> Task:
    """The task of a recipe; `class_numbers` holds the classes of all rows that are fitted."""
    if section.task == "classification":
        return ClassificationTask(WholeEncoder(tokenizer), section, class_numbers)
    if section.task == "seq2seq":
        return Seq2SeqTask(WholeEncoder(tokenizer), section)
    return SftTask(renderer, section)
