"""Documents made to fit `max_length`, and what that cost.

document         q q q q a a a a </s>          max_length 7
keep_start       q q q q a a a                 the answer is cut: it never ends
keep_end         q q a a a a </s>              behind the BOS, where there is one
context          q q a a a a </s>              the same length, but only the `context` column loses words
split            q q q q a a a | a a </s>      plain text only, other rows are refused; the token before a cut is
                                               read again, so that each token still has the one before it
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_ft.data.example import Example
from lora_ft.data.render import IGNORE_INDEX, Document, Renderer
from lora_ft.errors import Fault
from lora_ft.sections import DataSection


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of one document."""

    documents: tuple[Document, ...]
    """Documents of at most `max_length` tokens; several where a text was split, none where it was dropped."""
    is_truncated: bool = False
    """Whether tokens were lost."""
    is_answer_cut: bool = False
    """Whether the cut went through an answer, which lost its terminator."""


def fit_document(document: Document, example: Example, section: DataSection, renderer: Renderer) -> Fitted | Fault:
    """The document of an Example within `section.max_length` tokens, by the policy `section.truncation`."""
    limit = section.max_length
    if len(document.input_ids) <= limit:
        return Fitted((document,))
    if section.truncation == "drop":
        return Fitted(())
    if section.truncation == "split":
        if not example.messages and not example.prompt:
            return Fitted(_split(document, limit))
        rule = f"The row is longer than data.max_length ({limit}), and only a text without a prompt can be split."
        return Fault(document.place, f"{len(document.input_ids)} tokens", rule, "Choose another data.truncation.")
    if section.truncation == "keep_end":
        return Fitted((_keep_end(document, limit, renderer.num_begin_tokens(document)),), is_truncated=True)
    if section.truncation == "context" and example.context:
        document = _shorten_context(document, example, limit, renderer)
    kept = Document(document.input_ids[:limit], document.labels[:limit], document.place)
    border = document.labels[limit - 1 : limit + 1]
    return Fitted((kept,), is_truncated=True, is_answer_cut=len(border) == 2 and IGNORE_INDEX not in border)


def _split(document: Document, limit: int) -> tuple[Document, ...]:
    starts = range(0, len(document.input_ids) - 1, limit - 1)
    parts = [(document.input_ids[i : i + limit], document.labels[i + 1 : i + limit]) for i in starts]
    return tuple(Document(ids, [IGNORE_INDEX, *labels], document.place) for ids, labels in parts)


def _keep_end(document: Document, limit: int, begin: int) -> Document:
    ids, labels, tail = document.input_ids, document.labels, len(document.input_ids) - limit + begin
    return Document(ids[:begin] + ids[tail:], [*labels[:begin], IGNORE_INDEX, *labels[tail + 1 :]], document.place)


def _shorten_context(document: Document, example: Example, limit: int, renderer: Renderer) -> Document:
    """The document with as much of its context taken away, from its end, as it is too long; at most all of it."""
    context = example.context
    while context and (excess := len(document.input_ids) - limit) > 0:
        characters_per_token = len(example.text) / len(document.input_ids)
        context = context[: max(0, len(context) - max(1, int(excess * characters_per_token)))]
        document = renderer.render_one(replace_context(example, context))
    return document


def replace_context(example: Example, context: str) -> Example:
    """The example with another context in its prompt."""
    messages = tuple(
        {**message, "content": _replace_first(message["content"], example.context, context)}
        if message["role"] == "user"
        else message
        for message in example.messages
    )
    prompt = _replace_first(example.prompt, example.context, context)
    return replace(example, messages=messages, prompt=prompt, context=context)


def _replace_first(text: str, old: str, new: str) -> str:
    return text.replace(old, new, 1)
