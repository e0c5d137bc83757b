"""What keys, tokens and passwords look like.

In a recipe they are refused unseen, as it is stored with its run and shown in messages; in data they are counted, and
redacted where that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lora_ft.errors import Fault
from lora_ft.yaml_lines import Document, Key

SECRETS = (
    ("PRIVATE_KEY", ("-----BEGIN",), r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]+-----|$)"),
    ("API_KEY", ("sk-", "k_live_"), r"\b(?:sk-|[rs]k_live_)[A-Za-z0-9_-]{20,}"),
    ("API_KEY", ("AKIA", "ASIA"), r"\bA[KS]IA[0-9A-Z]{16}\b"),
    ("API_KEY", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
    ("API_KEY", ("github_pat_",), r"\bgithub_pat_\w{20,}"),
    ("API_KEY", ("hf_",), r"\bhf_[A-Za-z0-9]{20,}"),
    ("API_KEY", ("AIza",), r"\bAIza[0-9A-Za-z_-]{35}"),
    ("API_KEY", ("xox",), r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}"),
    ("TOKEN", ("eyJ",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ("PASSWORD", ("://",), r"(?<=://)[^\s:/@]{1,200}:[^\s/@]{1,200}(?=@)"),
)
"""(what it is, strings of which one stands in it, its form): what opens something, by how its issuers begin it, and
addresses with a password in them.
"""
_SECRET = re.compile("|".join(form for _, _, form in SECRETS))


def find_credentials(document: Document) -> Iterator[Fault]:
    """A fault for each value that holds a credential; the value itself is not shown."""
    for key, text in _texts(document.values, ()):
        if _SECRET.search(text):
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
