"""Conversations in OpenAI's form or ShareGPT's, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_ft.data.example import ANSWERING_ROLE, Example
from lora_ft.data.fields import BadRow, read_json_field, read_text

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
FLAGS = ("train", "weight")
PLAIN = frozenset({"role", "content"})
THINKING = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thinks before it answers; templates read the first."""


def read_messages(rows: Any, field: str) -> tuple[dict[str, Any], ...]:
    """Messages as chat templates take them, from OpenAI's form or ShareGPT's.

    None-valued keys are left out (files with typed columns fill them in), tool arguments become objects, text parts
    become one text.
    """
    if not isinstance(rows, (list, tuple)) or not rows:
        rule = "A conversation is a list of messages, and not empty."
        raise BadRow(field, rows, rule, 'Write [{"role": "user", "content": "…"}, …].')
    return tuple([read_message(row, f"{field}[{i}].") for i, row in enumerate(rows)])


def read_message(row: object, where: str) -> dict[str, Any]:
    """One message with a known role, and with text or tool calls in it."""
    if not isinstance(row, Mapping):
        raise BadRow(where.rstrip("."), row, "A message is an object.", 'Write {"role": "user", "content": "…"}.')
    if "from" in row and "role" not in row:
        row = _from_sharegpt(row, where)
    role = row.get("role")
    if role not in ROLES:
        raise BadRow(where + "role", role, f"A role is one of {', '.join(ROLES)}.", "Rename it.")
    if row.keys() == PLAIN and isinstance(content := row["content"], str) and content.isascii() and content.strip():
        return dict(row)  # nearly every message; what follows says the same, more slowly
    message = {key: value for key, value in row.items() if value is not None and key not in FLAGS}
    if not PLAIN.issuperset(message):
        _read_extras(message, where)
    if "content" in message:
        message["content"] = _read_content(message["content"], where)
    must_speak = role in ("user", ANSWERING_ROLE) and "tool_calls" not in message
    if must_speak and not message.get("content", "").strip():
        raise BadRow(where + "content", None, "The message is empty.", "Fill it, or skip such rows.")
    return message


def _read_extras(message: dict[str, Any], where: str) -> None:
    """Tool calls and thinking in their usual form; an empty list of calls is taken out."""
    calls = read_json_field(message.pop("tool_calls", None), where + "tool_calls")
    alone = read_json_field(message.pop("function_call", None), where + "function_call")
    if alone is not None and not calls:
        calls = [alone]  # OpenAI's older form, of one call
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise BadRow(where + "tool_calls", calls, "Tool calls are a list.", 'Write [{"function": {"name": …}}].')
    if calls:
        message["tool_calls"] = [_read_call(call, f"{where}tool_calls[{i}].") for i, call in enumerate(calls)]
    for name in THINKING:
        if name in message:
            message["reasoning_content"] = read_text(message, name, where)
            return


def _read_content(content: object, where: str) -> str:
    if isinstance(content, (list, tuple)):
        return "".join(_read_part(part, f"{where}content[{i}].") for i, part in enumerate(content))
    return read_text({"content": content}, "content", where)


def _read_part(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        return read_text(part, "text", where)
    kind = part.get("type") if isinstance(part, Mapping) else part
    fix = "Leave out rows with images, audio or files."
    raise BadRow(where + "type", kind, "Only text can be trained on.", fix)


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(where + "function", call, "A tool call names its function.", 'Write {"function": {"name": …}}.')
    arguments = read_json_field(function.get("arguments") or {}, where + "function.arguments")
    kept = {key: value for key, value in call.items() if value is not None and key not in ("name", "arguments")}
    return {"type": "function", **kept, "function": {**function, "arguments": arguments}}


def _from_sharegpt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = SHAREGPT_ROLES.get(row["from"]) if isinstance(row["from"], str) else None
    if role is None:
        raise BadRow(where + "from", row["from"], f"A speaker is one of {', '.join(SHAREGPT_ROLES)}.", "Rename it.")
    kept = {key: value for key, value in row.items() if key not in ("from", "value")}
    if row["from"] == "function_call":
        call = read_json_field(row.get("value"), where + "value")
        return {**kept, "role": role, "tool_calls": call if isinstance(call, list) else [call]}
    return {**kept, "role": role, "content": row.get("value")}


def is_muted(row: Mapping[str, Any]) -> bool:
    """Whether a message asks not to be learned: `train: false`, or OpenAI's `weight: 0`.

    Raises:
        BadRow: it says something else there, such as the word "false", and would be learned in spite of it.
    """
    flags = {key: row[key] for key in ("train", "weight") if row.get(key) is not None}
    for key, value in flags.items():
        if isinstance(value, str) or value not in (0, 1):
            rule = "Whether a message is learned is said by true and false, or 1 and 0."
            raise BadRow(key, value, rule, "Write one of them, or leave it out.")
    return not all(flags.values())


def read_conversation(place: str, rows: Any, field: str, tools: Any = None, system: str = "") -> Example:
    """A conversation with at least one answer; `system` goes first where there is no system message."""
    rows = read_json_field(rows, field)
    messages = read_messages(rows, field)
    muted = tuple(i for i, row in enumerate(rows) if is_muted(row))
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
        muted = tuple(i + 1 for i in muted)
    tools = read_json_field(tools, "tools") or ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools", tools, "Tools are a list of function schemas.", "Write them as OpenAI does.")
    if not any(message["role"] == ANSWERING_ROLE for message in messages):
        raise BadRow(field, None, "The conversation holds no answer to learn.", "Add a message of the assistant.")
    return Example(place, messages, tuple(tools), muted)
