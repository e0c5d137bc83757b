"""Credentials in a recipe are refused unseen: a recipe is stored with its run, and shown in messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lora_ft.errors import Fault
from lora_ft.yaml_lines import Document, Key

CREDENTIAL = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|://[^/\s:@]{1,200}:[^/\s@]{1,200}@"
)
"""Tokens of Hugging Face, OpenAI, GitHub and AWS by their beginnings, and addresses with a password in them."""


def find_credentials(document: Document) -> Iterator[Fault]:
    """A fault for each value that holds a credential; the value itself is not shown."""
    for key, text in _texts(document.values, ()):
        if CREDENTIAL.search(text):
            rule = "This looks like a token or a password, and a recipe is stored with its run."
            yield Fault(document.place(key), None, rule, "Put it into the environment, and make a new one.")


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(name, (*key, name)) if isinstance(name, str) else ()
            yield from _texts(item, (*key, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*key, index))
