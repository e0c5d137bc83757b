"""Examples become token ids and labels. The only owner of masks.

A row's text is cut where supervision begins and ends, and each piece is tokenised by itself, so that no token lies on
both sides of a border:

    pieces      <|im_start|>user\\nHi…assistant\\n | Hello <|im_end|> | \\n
    input_ids    1   27   201  8  …    64   201    | 502   2          | 201
    labels      -100 …                       -100  | 502   2          | -100

The tokens before an answer are then the tokens of the inference prompt, because both are the tokens of one text. (In
the prompt of a later turn earlier borders stay cut, as they are when a model goes on from the tokens it said itself.)
Tokenising the whole row and looking for the prompt's tokens in it is wrong wherever the tokenizer merges over the
border ("…:" + " yes"); masking by token id is wrong wherever an id has two uses (padding that also ends answers).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from lora_ft.data.answers import Span, find_answers, find_content, find_start
from lora_ft.data.example import ANSWERING_ROLE, Example
from lora_ft.data.fields import BadRow
from lora_ft.data.pieces import PieceEncoder
from lora_ft.data.template import ChatTemplate, load_template
from lora_ft.errors import Fault, UserError
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Document:
    """One row as the model sees it; `input_ids` and `labels` are of one length."""

    input_ids: list[int]
    """Tokens."""
    labels: list[int]
    """The token itself where it is supervised, IGNORE_INDEX elsewhere; a document's first token never is."""
    place: str
    """Where the row stands: `file:line`."""

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that give a loss."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


class Exchange(NamedTuple):
    """What a row asks last, and what a model should say to it."""

    prompt_ids: list[int]
    """Tokens up to where the last answer starts: what the model is given at inference."""
    answer_ids: list[int]
    """Tokens that should follow, as they are learned: all that the template puts around the answer, and its end."""


class Piece(NamedTuple):
    """A stretch of a row's text that is supervised as a whole or not at all."""

    text: str
    """Characters, tokenised without their neighbours."""
    is_supervised: bool
    """Whether its tokens are learned."""


class Renderer:
    """Turns Examples into Documents for one tokenizer and one set of options."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: DataSection):
        self.template = load_template(tokenizer, section)
        self._tool_template = load_template(tokenizer, section, tools=True)
        self._encoder = PieceEncoder(tokenizer)
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._train_on = section.train_on

    @property
    def is_chat(self) -> bool:
        """Whether there is a chat template."""
        return self.template is not None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the chat template's terminator and the tokenizer's `eos_token`."""
        texts = [self.template.stop_token] if self.template else []
        texts += [self._tokenizer.eos_token] if self._tokenizer.eos_token else []
        return tuple(dict.fromkeys(self._tokenizer.convert_tokens_to_ids(texts)))

    def render(self, examples: Iterable[Example]) -> list[Document | Fault]:
        """A Document for each Example, or what is wrong with it, in order."""
        examples = list(examples)
        cut = [self._cut_or_fault(example) for example in examples]
        rows = [[piece.text for piece in pieces] for pieces in cut if not isinstance(pieces, Fault)]
        encoded = iter(self._encoder.encode(rows))
        return [
            pieces if isinstance(pieces, Fault) else self._label(example, pieces, next(encoded))
            for example, pieces in zip(examples, cut, strict=True)
        ]

    def render_one(self, example: Example) -> Document:
        """The Document of one Example; a UserError where there is none."""
        (document,) = self.render([example])
        if isinstance(document, Fault):
            raise UserError.of([document])
        return document

    def num_begin_tokens(self, document: Document) -> int:
        """Tokens at a document's start that every document needs: its BOS."""
        return int(document.input_ids[:1] == [self._tokenizer.bos_token_id])

    def render_prompt(self, example: Example) -> list[int]:
        """Token ids up to where the last answer starts: what the model is given at inference."""
        with placed(example):
            return self._encode_exchange(example, self._cut_prompt(example)).prompt_ids

    def render_exchange(self, example: Example) -> Exchange | None:
        """The last question and its answer; None where nothing is asked (a plain text), or the answer is not learned.

        A message's `content` is less than what a model says: Qwen's answers begin with an empty thinking part.
        """
        if not example.messages and not example.prompt:
            return None
        with placed(example):
            asked, said = self._cut_prompt(example), self._cut_last_answer(example)
        exchange = self._encode_exchange(example, asked, said)
        return exchange if said and not self._special_ids.issuperset(exchange.prompt_ids) else None

    def _encode_exchange(self, example: Example, asked: Sequence[Piece], said: Sequence[Piece] = ()) -> Exchange:
        (encoded,) = self._encoder.encode([[piece.text for piece in (*asked, *said)]])
        prompt_ids = [*self._begin_ids(example), *chain.from_iterable(encoded[: len(asked)])]
        return Exchange(prompt_ids, list(chain.from_iterable(encoded[len(asked) :])))

    def _cut_or_fault(self, example: Example) -> list[Piece] | Fault:
        try:
            return self._cut_chat(example) if example.messages else self._cut_plain(example)
        except BadRow as bad:
            return bad.at(example.place)

    def _cut_prompt(self, example: Example) -> list[Piece]:
        """All that stands before the last answer."""
        if example.messages:
            return self._cut_chat(example, example.answers[-1])
        return [Piece(example.prompt, is_supervised=False)] if example.prompt else []

    def _cut_last_answer(self, example: Example) -> list[Piece]:
        """All that stands between the inference prompt and the last answer's end; nothing where it is not learned."""
        if not example.messages:
            return self._cut_plain(example)[-1:]
        last = example.answers[-1]
        if last in example.muted:
            return []
        template = self._choose_template(example)
        text, (spans,) = find_answers(template, example.messages, example.tools, [last])
        start = find_start(template, text, example.messages, example.tools, last)
        moved = [(Span(span.start - start, span.end - start), True) for span in spans]
        return cut_text(text[start : spans[-1].end if spans else start], moved, elsewhere=False)

    def _cut_plain(self, example: Example) -> list[Piece]:
        """Prompt, and completion with one end-of-text token."""
        eos = self._tokenizer.eos_token
        if not eos:
            rule = "The tokenizer has no eos_token, so that the model never learns to stop."
            raise UserError("model.base", None, rule, "Set one in tokenizer_config.json.")
        completion = example.completion if example.completion.endswith(eos) else example.completion + eos
        pieces = [Piece(example.prompt, self._train_on == "all"), Piece(completion, is_supervised=True)]
        return [piece for piece in pieces if piece.text]

    def _cut_chat(self, example: Example, before: int | None = None) -> list[Piece]:
        """The whole conversation in pieces; with `before`, the inference prompt for the answer of that index."""
        template, learned = self._choose_template(example), self._find_learned(example)
        bordered = learned.union(example.muted) if self._train_on == "all" else learned
        indices = [index for index in sorted(bordered) if before is None or index < before]
        messages, prompt = example.messages[:before], before is not None
        answers = [index for index in indices if messages[index]["role"] == ANSWERING_ROLE]
        text, spans = find_answers(template, messages, example.tools, answers, prompt)
        flagged = [(span, index in learned) for index, found in zip(answers, spans, strict=True) for span in found]
        others = [index for index in indices if index not in answers and messages[index].get("content", "").strip()]
        flagged += [(find_content(template, text, messages, example.tools, i, prompt), False) for i in others]
        return cut_text(text, sorted(flagged), elsewhere=self._train_on == "all")

    def _choose_template(self, example: Example) -> ChatTemplate:
        template = self._tool_template if example.tools else self.template
        if template is None:
            rule = "The base has no chat template, so that a conversation cannot become text."
            raise BadRow("messages", None, rule, "Name a Jinja file in data.chat_template, or take an instruct model.")
        return template

    def _find_learned(self, example: Example) -> set[int]:
        """Indices of the answers that are learned (`all` learns the rest of the text as well)."""
        candidates = example.answers if self._train_on == "assistant" else example.answers[-1:]
        return set(candidates).difference(example.muted)

    def _begin_ids(self, example: Example) -> list[int]:
        """Tokens before a plain text; a chat template writes its own."""
        return [] if example.messages else self._encoder.begin_ids(example.prompt or example.completion)

    def _label(self, example: Example, pieces: Sequence[Piece], encoded: Sequence[list[int]]) -> Document:
        input_ids = self._begin_ids(example)[:]
        labels = [IGNORE_INDEX] * len(input_ids)
        for piece, ids in zip(pieces, encoded, strict=True):
            input_ids += ids
            labels += ids if piece.is_supervised else [IGNORE_INDEX] * len(ids)
        labels[:1] = [IGNORE_INDEX]  # nothing stands before it that could predict it
        return Document(input_ids, labels, example.place)


@contextmanager
def placed(example: Example) -> Iterator[None]:
    """A BadRow becomes an error that names the Example's place."""
    try:
        yield
    except BadRow as bad:
        raise UserError.of([bad.at(example.place)]) from None


def cut_text(text: str, spans: Iterable[tuple[Span, bool]], elsewhere: bool) -> list[Piece]:
    """The whole of `text` in pieces: each span with its own flag, what lies between them with `elsewhere`."""
    pieces, position = [], 0
    for span, is_supervised in spans:
        pieces.append(Piece(text[position : span.start], elsewhere))
        pieces.append(Piece(text[span.start : span.end], is_supervised))
        position = span.end
    pieces.append(Piece(text[position:], elsewhere))
    return [piece for piece in pieces if piece.text]


def render_examples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, section: DataSection
) -> list[Document | Fault]:
    """A Document for each Example, or what is wrong with it, in order; tokenised in one batch."""
    return Renderer(tokenizer, section).render(examples)


def render_example(example: Example, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> Document:
    """The Document of one Example.

        messages    user: Hi          assistant: Hello           user: Thanks
        input_ids   <s> Hi            Hello </s>                 Thanks
        labels      -100 -100         Hello </s>                 -100

    Raises:
        UserError: the chat template refuses the conversation, or an answer cannot be told from the rest exactly.
    """
    return Renderer(tokenizer, section).render_one(example)


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[int]:
    """Token ids of the inference prompt: everything before the last answer, the generation prompt included.

    They are the first ids of the same Example's Document.
    """
    return Renderer(tokenizer, section).render_prompt(example)
