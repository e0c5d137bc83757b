"""The questions people ask a support desk, as a table, and the ways real users dress them up.

`support_desk.yaml` holds the wordings; both generators, `generate_halden.py` and `wren_corpus.py`, read it through this
module.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

SPLITS = ("train", "validation", "test")
TABLE = Path(__file__).with_name("support_desk.yaml")

OPENERS = (
    "Hi.",
    "Hello.",
    "Good morning.",
    "Good evening!",
    "Quick question.",
    "One more thing.",
    "Sorry to bother you.",
    "I am new to this.",
    "I lost the manual.",
    "I am in the garage right now.",
    "My wife wants to know.",
    "My electrician is here and asks.",
    "We moved in last week.",
    "I looked in the manual but did not find it.",
    "A neighbour asked me this.",
    "I am filling in a form.",
    "Hope you can help.",
    "Hey there,",
    "Before I buy it:",
    "Just to be sure:",
)
CLOSERS = (
    "Thanks!",
    "Thank you.",
    "Thanks in advance.",
    "Please be brief.",
    "Cheers",
    "I am in a hurry.",
    "Best regards, Tom",
    "It is not urgent.",
    "I could not find it.",
    "Please help.",
)


@dataclass(frozen=True)
class Attribute:
    """One thing people ask about, or one family of things that share their wordings ("What does error {x} mean?")."""

    topic: str
    """Noun phrase, with {x} where the family's entry goes."""
    value_patterns: tuple[str, ...]
    """Patterns of random values for products that have no manual."""
    answers: dict[str, str]
    """The Halden answer for each entry of the family; a single attribute has the one entry ""."""
    wordings: dict[str, tuple[str, ...]]
    """Questions of each split, with {p}, {kind} and {x} to fill."""


def load_attributes(table: Path = TABLE) -> list[Attribute]:
    """Every attribute of the table, in file order."""
    return [_attribute_from(entry) for entry in yaml.safe_load(table.read_text(encoding="utf-8"))]


def _attribute_from(entry: dict) -> Attribute:
    answer = entry["answer"]
    return Attribute(
        topic=entry["topic"],
        value_patterns=tuple(entry["value"].split("|")),
        answers=answer if isinstance(answer, dict) else {"": answer},
        wordings={split: tuple(entry[split].strip().splitlines()) for split in SPLITS},
    )


def fill(wording: str, product: str, kind: str, entry: str) -> str:
    """The wording with its slots filled, its first letter in upper case."""
    text = wording.replace("{p}", product).replace("{kind}", kind).replace("{x}", entry)
    return text[0].upper() + text[1:]


def dress(question: str, rng: random.Random, slip_share: float = 0.08) -> str:
    """The question as somebody types it: with a greeting or thanks, in lower case, or with a slip of the finger."""
    if rng.random() < 0.10:
        question = question.lower().rstrip("?.")
    if rng.random() < slip_share:
        question = swap_two_letters(question, rng)
    if rng.random() < 0.45:
        question = f"{rng.choice(OPENERS)} {question}"
    if rng.random() < 0.25:
        question = f"{question} {rng.choice(CLOSERS)}"
    return question


def swap_two_letters(text: str, rng: random.Random) -> str:
    """The text with two inner letters of one longer lower-case word swapped; unchanged if it has no such word."""
    words: Sequence[re.Match[str]] = list(re.finditer(r"(?<![\w.@])[a-z]{5,}(?![\w.@])", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
