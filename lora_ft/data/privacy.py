"""Personal data and secrets in text: found by their form, and by their check digits where they have some.

Presidio's analyser would bring spaCy and its models, half a gigabyte, to find what has a form anyway; names of persons,
which have none, are not looked for here. Check digits are python-stdnum's.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stdnum import iban, luhn
from stdnum.br import cpf
from stdnum.es import nif
from stdnum.fr import nir
from stdnum.in_ import aadhaar
from stdnum.it import codicefiscale
from stdnum.us import ssn

from lora_ft import credentials
from lora_ft.data.example import Example


@dataclass(frozen=True)
class Recogniser:
    """One kind of private data."""

    name: str
    """What it is; `[NAME]` takes its place in redacted text."""
    hint: tuple[str, ...] | re.Pattern[str]
    """Strings of which one stands in whatever has the form, or a pattern that is quick to search; without it, `pattern`
    is not tried."""
    pattern: str
    """The form."""
    is_valid: Callable[[str], bool] = lambda found: True
    """Whether what has the form is of the kind: check digits, ranges."""
    is_secret: bool = False
    """Whether it opens something (a key, a password)."""


def _is_public_address(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and luhn.is_valid(digits)


def _is_phone(found: str) -> bool:
    return 8 <= len(re.sub(r"\D", "", found)) <= 15


CODICE_FISCALE = r"\b[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]\b"
IPV4 = r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)"
IPV6 = r"(?<![\w:])(?:[\da-fA-F]{1,4}:){2,7}(?::?[\da-fA-F]{1,4})+(?![\w:])"
MANY_DIGITS = re.compile(r"\d(?:[ .()/-]{0,2}\d){6}")
"""Seven digits or more that belong together: what most numbers of a person have."""
CAPITALS_AND_DIGITS = re.compile(r"[A-Z]{2}\d\d")
PHONE_ABROAD = r"(?<![\w.])(?:\+|(?<!\d[ -])00)[1-9]\d{0,2}(?:[ .()/-]{0,2}\d){6,12}(?!\d)"
PHONE_AMERICAN = r"(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![\w-])"

RECOGNISERS = (
    *(Recogniser(name, hint, form, is_secret=True) for name, hint, form in credentials.SECRETS),
    Recogniser("EMAIL", ("@",), r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    Recogniser("IBAN", CAPITALS_AND_DIGITS, r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]){11,30}\b", iban.is_valid),
    Recogniser("CARD", MANY_DIGITS, r"\b\d(?:[ -]?\d){12,18}\b", _is_card),
    Recogniser("NATIONAL_ID", MANY_DIGITS, r"\b\d{3}-\d\d-\d{4}\b", ssn.is_valid),
    Recogniser("NATIONAL_ID", MANY_DIGITS, r"\b[XYZ\d]\d{7}-?[A-Z]\b", nif.is_valid),
    Recogniser("NATIONAL_ID", CAPITALS_AND_DIGITS, CODICE_FISCALE, codicefiscale.is_valid),
    Recogniser("NATIONAL_ID", MANY_DIGITS, r"\b[12] ?\d\d ?\d\d ?\w\w ?\d{3} ?\d{3} ?\d\d\b", nir.is_valid),
    Recogniser("NATIONAL_ID", MANY_DIGITS, r"\b\d{4} \d{4} \d{4}\b", aadhaar.is_valid),
    Recogniser("NATIONAL_ID", MANY_DIGITS, r"\b\d{3}\.\d{3}\.\d{3}-\d\d\b", cpf.is_valid),
    Recogniser("IP_ADDRESS", re.compile(r"\d\.\d{1,3}\."), IPV4, _is_public_address),
    Recogniser("IP_ADDRESS", (":",), IPV6, _is_public_address),
    Recogniser("PHONE", MANY_DIGITS, PHONE_ABROAD, _is_phone),
    Recogniser("PHONE", MANY_DIGITS, PHONE_AMERICAN),
)
"""What is looked for, in this order; what an earlier one has taken a later one does not see."""

_SEARCHES = tuple((kind, re.compile(kind.pattern).finditer) for kind in RECOGNISERS)
_HINTS = tuple(dict.fromkeys(kind.hint for kind in RECOGNISERS))
SECRETS = frozenset(kind.name for kind in RECOGNISERS if kind.is_secret)
"""Kinds that open something."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One stretch of private data."""

    name: str
    """What it is."""
    start: int
    """Its first character."""
    end: int
    """Just after its last character."""


def find_private(text: str) -> list[Finding]:
    """What is private in a text, in order, without overlaps."""
    found: list[Finding] = []
    hints = {hint for hint in _HINTS if _has_hint(text, hint)}
    for kind, matches in _SEARCHES:
        if kind.hint in hints:
            found += [
                Finding(kind.name, match.start(), match.end())
                for match in matches(text)
                if kind.is_valid(match.group()) and not any(_overlap(match, other) for other in found)
            ]
    return sorted(found, key=lambda finding: finding.start)


def _has_hint(text: str, hint: tuple[str, ...] | re.Pattern[str]) -> bool:
    if isinstance(hint, re.Pattern):
        return hint.search(text) is not None
    return any(part in text for part in hint)


def _overlap(match: re.Match[str], other: Finding) -> bool:
    return match.start() < other.end and other.start < match.end()


def redact_text(text: str, counts: Counter[str]) -> str:
    """The text with `[NAME]` for each stretch of private data.

    anna@example.org, +49 30 1234567   →   [EMAIL], [PHONE]
    """
    parts, position = [], 0
    for finding in find_private(text):
        counts[finding.name] += 1
        parts += [text[position : finding.start], f"[{finding.name}]"]
        position = finding.end
    return "".join([*parts, text[position:]])


def redact_example(example: Example, counts: Counter[str]) -> Example:
    """The example with all its text redacted; its label, and what it is called, stay."""
    return replace(
        example,
        messages=tuple(_redact_message(message, counts) for message in example.messages),
        prompt=redact_text(example.prompt, counts),
        completion=redact_text(example.completion, counts),
        context=redact_text(example.context, Counter()),
    )


def _redact_message(message: Any, counts: Counter[str]) -> dict[str, Any]:
    kept = ("role", "name", "tool_call_id")
    return {key: value if key in kept else _redact_value(value, counts) for key, value in message.items()}


def _redact_value(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, str):
        return redact_text(value, counts)
    if isinstance(value, dict):
        return {key: _redact_value(item, counts) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact_value(item, counts) for item in value]
    return value
