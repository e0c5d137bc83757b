"""Tools and tool calls that a chat template must show: many know of none, and drop them without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_ft.data.example import Message
from lora_ft.data.fields import BadRow, shorten
from lora_ft.data.template import ChatTemplate

FIX = "Name a template that shows tools and their calls (data.chat_template), or leave them out of the row."


def check_call(answer: str, call: Mapping[str, Any], field: str) -> None:
    """Nothing when a call stands in the rendered answer: its function's name, and all texts and whole numbers given.

    Each may stand there as it is, or as JSON writes it, once or (where the arguments are a text themselves) twice.
    """
    function, answer = call["function"], squeeze(answer)
    expected = {"name": [function["name"]], "arguments": find_values(function.get("arguments"))}
    for key, values in expected.items():
        for value in values:
            if not any(squeeze(form) in answer for form in write_forms(value)):
                rule = "The chat template leaves out or rewrites this tool call."
                raise BadRow(f"{field}.{key}", shorten(value), rule, FIX)


def find_values(value: Any) -> Iterator[str]:
    """The texts and whole numbers in a JSON value; other numbers are written in more than one way."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from find_values(item)
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        yield str(value)


def write_forms(text: str) -> Iterator[str]:
    """The ways in which templates write a text: as it is, and between the quotes of Python and JSON."""
    yield text
    yield repr(text)[1:-1]
    for ensure_ascii in (False, True):
        written = json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]
        yield written
        yield json.dumps(written, ensure_ascii=ensure_ascii)[1:-1]


def check_tools(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Message]) -> None:
    """Nothing when the chat template shows every tool that has a name.

    The tools are given other names, and these looked for: a tool's own name stands in the calls of it too.
    """
    probes = [f"lora_ft_probe_{number}_" for number in range(len(tools))]
    text = template.render(messages, [rename_tool(*pair) for pair in zip(tools, probes, strict=True)])
    for number, (tool, probe) in enumerate(zip(tools, probes, strict=True)):
        if (name := find_function(tool).get("name")) and probe not in text:
            rule = "The chat template leaves out this tool, so that the model does not read what it may call."
            raise BadRow(f"tools[{number}]", name, rule, FIX)


def find_function(tool: Message) -> Message:
    """What a tool says of its function; OpenAI's form has it under a key of its own."""
    return tool["function"] if isinstance(tool.get("function"), Mapping) else tool


def rename_tool(tool: Message, name: str) -> Message:
    """The tool under another name."""
    function = find_function(tool)
    renamed = {**function, "name": name}
    return renamed if function is tool else {**tool, "function": renamed}


def squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())
