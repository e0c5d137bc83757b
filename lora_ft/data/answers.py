"""Where the assistant's answers stand in a rendered conversation.

An answer starts where the inference prompt for it ends, and ends with the token that the model is to stop on:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    └────────── inference prompt ──────────────────────┘└──── answer ───┘

Both ends are read off rendered text and checked in every row. The naive ways go wrong: a prefix of *tokens* breaks
where the tokenizer merges across the border; the position of the *content* misses what the template puts around it
(Mistral's space before an answer, Qwen's empty thinking part), which the model must say by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lora_ft.data.calls import check_call, check_tools, squeeze, write_forms
from lora_ft.data.example import Message
from lora_ft.data.fields import BadRow, shorten
from lora_ft.data.template import PROBE, ChatTemplate

LAST_ONLY = "Learn the last answer only (data.train_on: last), or mend the template (data.chat_template)."


class Span(NamedTuple):
    """Characters of a rendered conversation that the assistant says: `text[start:end]`."""

    start: int
    """Where the inference prompt ends."""
    end: int
    """Just after the terminator."""


def find_answers(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Message],
    wanted: Sequence[int],
    prompt: bool = False,
) -> tuple[str, list[list[Span]]]:
    """The rendered conversation, and for each answer in `wanted` (indices of messages) its spans in it.

    An answer is one span; in a template with generation marks it is what the marks take in, nothing at all included.

    Raises:
        BadRow: the template rewrites, drops or does not end an answer, so that its span cannot be known.
    """
    marks = None
    if template.has_marks:
        text, marks = template.render_marked(messages, tools, prompt)
    else:
        text = template.render(messages, tools, prompt)
    if tools and not prompt:
        check_tools(template, messages, tools)
    starts = [find_start(template, text, messages, tools, index) for index in wanted]
    found = []
    for index, start, limit in zip(wanted, starts, [*starts, len(text)][1:], strict=True):
        end = find_end(template, text, start, limit, messages[index])
        check_whole(template, text, start, end or limit, messages[index], index)
        spans = [Span(start, end)] if end else None
        if marks is not None:
            spans = clip_marks(template, text, start, end, [mark for mark in marks if start < mark[1] <= limit])
        if spans is None:
            rule = f"The chat template does not end this answer with {template.terminator!r}, the token to stop on."
            raise BadRow(f"messages[{index}]", f"…{text[start:limit][-60:]!r}", rule, LAST_ONLY)
        found.append(spans)
    return text, found


def find_start(
    template: ChatTemplate, text: str, messages: Sequence[Message], tools: Sequence[Message], index: int
) -> int:
    """Where the inference prompt for an answer ends in `text`, which must start with that prompt."""
    prompt = template.render(messages[:index], tools, prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    rule = "The chat template writes the inference prompt for this answer otherwise once the answer stands behind it."
    fix = f"Begin answers as the prompt asks (with <think>, say), or turn that off by data.template_kwargs. {LAST_ONLY}"
    raise BadRow(f"messages[{index}]", f"the prompt ends …{prompt[-40:]!r}", rule, fix)


def find_content(
    template: ChatTemplate,
    text: str,
    messages: Sequence[Message],
    tools: Sequence[Message],
    index: int,
    prompt: bool = False,
) -> Span:
    """Where the content of a message stands in `text`, white space around it left out; it need not be an answer.

    The same conversation is rendered with a probe in its place: looked for as it is, "user" stands in every header.
    """
    message = messages[index]
    said = message["content"].strip()
    probed = {**message, "content": message["content"].replace(said, PROBE, 1)}
    other = template.render([*messages[:index], probed, *messages[index + 1 :]], tools, prompt)
    start = other.find(PROBE)
    for written in write_forms(said):  # of a tool, as JSON perhaps
        if text == other[:start] + written + other[start + len(PROBE) :]:
            return Span(start, start + len(written))
    rule = "The chat template rewrites this message, so that it cannot be left out of what is learned."
    raise BadRow(f"messages[{index}].content", shorten(said), rule, "Take away its `train` or `weight`.")


def find_end(template: ChatTemplate, text: str, start: int, limit: int, message: Message) -> int | None:
    """Just after the terminator behind an answer; None where another special token comes first, or none at all."""
    content = message.get("content", "").strip()
    found = text.find(content, start, limit) if content else -1
    after = found + len(content) if found >= 0 else start
    end = text.find(template.terminator, after, limit)
    runs_on = found >= 0 and "tool_calls" not in message and template.special.search(text, after, max(end, after))
    return None if end < 0 or runs_on else pass_space(template, text, end + len(template.terminator))


def clip_marks(
    template: ChatTemplate, text: str, start: int, end: int | None, marks: Sequence[tuple[int, int]]
) -> list[Span] | None:
    """An answer's marks between the prompt's end and the terminator's end; None where they leave out its terminator.

    text    <|im_start|>assistant\\n  Hello <|im_end|> \\n
    mark    └──────────────────────────────┘                 takes in the prompt, leaves out the terminator
    span                             └─────────────┘
    """
    clipped = [(max(first, start), min(last, end or last)) for first, last in marks]
    clipped = [(first, last) for first, last in clipped if first < last]
    if not clipped:
        return []
    last = clipped[-1][1]
    if end is None:  # the template ends this kind of answer by another special token
        end = len(text[:last].rstrip())
        if not any(match.end() == end for match in template.special.finditer(text, start, end)):
            return None
    elif text[last:end].strip() not in ("", template.terminator):
        return None
    if not text[start : clipped[0][0]].strip():  # white space before the mark, which the model must say by itself
        clipped[0] = (start, clipped[0][1])
    clipped[-1] = (clipped[-1][0], end)
    return [Span(*mark) for mark in clipped]


def check_whole(template: ChatTemplate, text: str, start: int, end: int, message: Message, index: int) -> None:
    """Nothing when an answer is rendered whole but for white space, its thinking too, and spells no terminator.

    The answer is `text[start:end]`; the inference prompt before it may open it already (`<think>`).
    """
    for field in ("content", "reasoning_content"):
        said = message.get(field, "").strip()
        if not said:
            continue
        if template.terminator in said:
            rule = f"The answer itself spells {template.terminator!r}, the token to stop on."
            raise BadRow(f"messages[{index}].{field}", shorten(said), rule, "Take it out of the text.")
        if text.find(said, start, end) < 0 and not _goes_on(text[max(0, start - 80) : start], text[start:end], said):
            rule = "The chat template leaves out or rewrites a part of this answer."
            raise BadRow(f"messages[{index}].{field}", shorten(said), rule, LAST_ONLY)
    for number, call in enumerate(message.get("tool_calls", ())):
        check_call(text[start:end], call, f"messages[{index}].tool_calls[{number}].function")


def pass_space(template: ChatTemplate, text: str, end: int) -> int:
    """The end moved over white space that the tokenizer counts to the terminator (an added token with `rstrip`)."""
    return end + len(text[end:]) - len(text[end:].lstrip()) if template.terminator_takes_space else end


def _goes_on(before: str, rendered: str, said: str) -> bool:
    """Whether what is said stands in `rendered` but for white space, or for a start that ends `before`."""
    before, said = squeeze(before), squeeze(said)
    lengths = range(min(len(before), len(said)), 0, -1)
    opened = next((n for n in lengths if before.endswith(said[:n])), 0)
    return said[opened:] in squeeze(rendered)
