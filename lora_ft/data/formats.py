"""Row formats: which columns each wants, and how a row of it becomes an Example.

A new format is one function that takes a row's columns and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from lora_ft.data.example import ANSWERING_ROLE, Example
from lora_ft.data.fields import BadRow, Fields, read_text, require_text
from lora_ft.data.messages import read_conversation
from lora_ft.errors import Fault


def _exchange(place: str, question: str, answer: str, plain: str, chat: bool, system: str = "", **rest) -> Example:
    """One question and its answer: as a conversation where the base can chat, otherwise as plain text."""
    if not chat:
        return Example(place, prompt=plain, completion=answer, **rest)
    spoken = [("system", system), ("user", question), (ANSWERING_ROLE, answer)]
    return Example(place, tuple({"role": role, "content": text} for role, text in spoken if text), **rest)


def from_messages(fields: Fields, place: str, chat: bool) -> Example:
    """`messages`: OpenAI's conversations, with `tools` beside them."""
    return read_conversation(place, fields["messages"], "messages", fields.get("tools"))


def from_sharegpt(fields: Fields, place: str, chat: bool) -> Example:
    """`conversations`: a list of {from, value}, with `system` and `tools` beside it."""
    system = read_text(fields, "system")
    return read_conversation(place, fields["conversations"], "conversations", fields.get("tools"), system)


def from_alpaca(fields: Fields, place: str, chat: bool) -> Example:
    """`instruction`, `output`, and where there are any `input` and `system`."""
    instruction, answer = require_text(fields, "instruction"), require_text(fields, "output")
    if fields.get("history"):
        rule = "Turns before the instruction are not read from Alpaca's form."
        raise BadRow("history", fields["history"], rule, "Write the row as messages.")
    extra, system = read_text(fields, "input"), read_text(fields, "system")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    parts = [system] if system else []
    parts.append(f"### Instruction:\n{instruction}")
    parts += [f"### Input:\n{extra}"] if extra.strip() else []
    plain = "\n\n".join([*parts, "### Response:\n"])
    return _exchange(place, question, answer, plain, chat, system)


def from_prompt_completion(fields: Fields, place: str, chat: bool) -> Example:
    """`prompt` and `completion`: two texts that are joined as they are, or two lists of messages, with `system`."""
    prompt, completion = fields["prompt"], fields["completion"]
    system = read_text(fields, "system")
    if isinstance(prompt, str) and isinstance(completion, str):
        if system.strip():
            rule = "A prompt that is a text is taken as it is, and has no place for a system message."
            raise BadRow("system", system, rule, "Write it into the prompt, or give messages.")
        answer = require_text(fields, "completion")
        return Example(place, prompt=read_text(fields, "prompt"), completion=answer)
    for field, value in (("prompt", prompt), ("completion", completion)):
        if value is None:
            raise BadRow(field, None, "There is nothing in it.", "Fill it, or skip such rows.")
    if not isinstance(prompt, (list, tuple)) or not isinstance(completion, (list, tuple)):
        rule = "Prompt and completion are both texts or both lists of messages."
        raise BadRow("prompt", f"{type(prompt).__name__} and {type(completion).__name__}", rule, "Write them alike.")
    example = read_conversation(place, [*prompt, *completion], "prompt + completion", fields.get("tools"), system)
    begun = len(example.messages) - len(completion)
    if example.answers[-1] < begun:
        raise BadRow("completion", None, "The completion holds no answer to learn.", "Add a message of the assistant.")
    read_only = [index for index in example.answers if index < begun]
    return replace(example, muted=tuple(sorted({*read_only, *example.muted})))


def from_qa(fields: Fields, place: str, chat: bool) -> Example:
    """`question` and `answer`, and where there are any `system` and `context`, which alone is shortened."""
    question, answer = require_text(fields, "question"), require_text(fields, "answer")
    context, system = read_text(fields, "context"), read_text(fields, "system")
    asked = f"{context}\n\n{question}" if context.strip() else question
    read = f"context: {context}\n" if context.strip() else ""
    plain = f"{system}\n\n" * bool(system) + f"question: {question}\n{read}answer:\n"
    return _exchange(place, asked, answer, plain, chat, system, context=context)


def from_squad(fields: Fields, place: str, chat: bool) -> Example:
    """`context`, `question` and `text`, the answer: as the SQuAD data set is often handed on in one table."""
    return from_qa({**fields, "answer": fields["text"]}, place, chat)


def from_classification(fields: Fields, place: str, chat: bool) -> Example:
    """`text` and `label`; the label is the answer where text is generated."""
    text, label = require_text(fields, "text"), fields.get("label")
    if isinstance(label, int):
        label = str(label)
    label = require_text({"label": label}, "label").strip()
    return _exchange(place, text, label, text + "\n\n", chat, context=text, label=label)


def from_text(fields: Fields, place: str, chat: bool) -> Example:
    """`text`: every token is learned (continued pre-training)."""
    return Example(place, completion=require_text(fields, "text"))


@dataclass(frozen=True)
class Format:
    """How rows of one kind look and how they are read."""

    required: tuple[str, ...]
    """Columns a row must have."""
    optional: tuple[str, ...]
    """Columns that are read where they are there."""
    convert: Callable[[Fields, str, bool], Example]
    """The Example of a row: takes its columns, its place, and whether the base has a chat template."""

    @cached_property
    def columns(self) -> frozenset[str]:
        """All that are read."""
        return frozenset((*self.required, *self.optional))


FORMATS = {
    "messages": Format(("messages",), ("tools",), from_messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), from_sharegpt),
    "prompt_completion": Format(("prompt", "completion"), ("system", "tools"), from_prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), from_alpaca),
    "qa": Format(("question", "answer"), ("context", "system"), from_qa),
    "squad": Format(("context", "question", "text"), ("system",), from_squad),
    "classification": Format(("text", "label"), (), from_classification),
    "text": Format(("text",), (), from_text),
}


def find_format(fields: Fields) -> str | None:
    """The first format in the table whose required columns are there; one whose columns are all null comes last."""
    fitting = [name for name, form in FORMATS.items() if set(form.required).issubset(fields)]
    filled = (name for name in fitting if any(fields[column] is not None for column in FORMATS[name].required))
    return next(filled, fitting[0] if fitting else None)


def describe_formats() -> str:
    """The accepted formats with their columns, in one line."""
    return "; ".join(f"{name} ({', '.join(form.required)})" for name, form in FORMATS.items())


def convert_row(fields: object, place: str, name: str, chat: bool) -> Example | Fault:
    """The Example of one row in the format `name` (`auto`: found from its columns), or what is wrong with it."""
    try:
        if not isinstance(fields, Mapping):
            raise BadRow("", fields, "A row is an object with columns.", f"Accepted: {describe_formats()}.")
        found = find_format(fields) if name == "auto" else name
        if found is None or not set(FORMATS[found].required).issubset(fields):
            raise _unknown_columns(fields, name)
        return FORMATS[found].convert(fields, place, chat)
    except BadRow as bad:
        return bad.at(place)


def _unknown_columns(fields: Fields, name: str) -> BadRow:
    columns = ", ".join(map(str, fields)) or "none"
    if name == "auto":
        rule = f"These columns fit no format. Accepted: {describe_formats()}."
        return BadRow("", f"columns {columns}", rule, "Rename them, or map them with data.sources[].columns.")
    missing = [column for column in FORMATS[name].required if column not in fields]
    wanted = ", ".join(FORMATS[name].required)
    rule = f"Format {name} (named in the recipe, or found in the file's first row) wants {wanted}; missing: "
    fix = "Map them with data.sources[].columns; rows of another format belong in a file of their own."
    return BadRow("", f"columns {columns}", rule + ", ".join(missing) + ".", fix)
