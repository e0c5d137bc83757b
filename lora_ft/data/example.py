"""One row after its format was understood: a conversation, or a prompt with its completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

Message = Mapping[str, Any]

ANSWERING_ROLE = "assistant"


@dataclass(frozen=True, slots=True)
class Example:
    """What one row teaches. Either `messages` is filled, or `completion` (with or without a `prompt`)."""

    place: str
    """Where the row stands: `file:line`."""
    messages: tuple[Message, ...] = ()
    """The conversation, as chat templates take it: role, content, tool_calls …; empty for plain text."""
    tools: tuple[Message, ...] = ()
    """JSON schemas of the functions the assistant may call."""
    muted: tuple[int, ...] = ()
    """Indices of messages that are read but not learned (`train: false`)."""
    prompt: str = ""
    """Plain text that is read but not learned."""
    completion: str = ""
    """Plain text that is learned."""
    context: str = ""
    """The stretch of the prompt that may be shortened where the row is too long (question answering)."""
    label: str | None = None
    """Class of the row."""

    @property
    def answers(self) -> tuple[int, ...]:
        """Indices of the messages that the assistant wrote."""
        return tuple(i for i, message in enumerate(self.messages) if message["role"] == ANSWERING_ROLE)

    @property
    def reference(self) -> str:
        """The last answer as text: what a generation is compared with."""
        if not self.messages:
            return self.completion
        message = self.messages[self.answers[-1]]
        return message.get("content") or orjson.dumps(message["tool_calls"]).decode()

    @property
    def question(self) -> str:
        """All text before the last answer; the whole text where there is no prompt."""
        if not self.messages:
            return self.prompt or self.completion
        return "\n".join(_texts(self.messages[: self.answers[-1]])) or self.text

    @property
    def parts(self) -> tuple[str, str, str]:
        """The first question, with all that stands before it; its answer; and how the conversation goes on."""
        if not self.messages:
            return self.question, self.completion, ""
        asked = next((i for i, message in enumerate(self.messages) if message["role"] == "user"), 0)
        answer = next((i for i in self.answers if i > asked), self.answers[-1])
        turns = self.messages[:answer], self.messages[answer : answer + 1], self.messages[answer + 1 :]
        question, said, rest = ["\n".join(_texts(part)) for part in turns]
        return question or self.text, said, rest

    @property
    def text(self) -> str:
        """All text of the row."""
        return "\n".join(_texts(self.messages)) if self.messages else self.prompt + self.completion

    def to_json(self) -> bytes:
        """The example as one line of JSON, which `from_json` reads back equal; a TypeError for what JSON cannot say."""
        return orjson.dumps([getattr(self, name) for name in self.__slots__], option=orjson.OPT_PASSTHROUGH_DATETIME)

    @classmethod
    def from_json(cls, line: bytes | str) -> Example:
        """The example that `to_json` wrote."""
        place, messages, tools, muted, *rest = orjson.loads(line)
        return cls(place, tuple(messages), tuple(tools), tuple(muted), *rest)


def _texts(messages: tuple[Message, ...]) -> Iterator[str]:
    for message in messages:
        if text := message.get("content"):
            yield text
        if calls := message.get("tool_calls"):
            yield orjson.dumps(calls).decode()
