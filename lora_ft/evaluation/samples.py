"""Answers beside their references, with what differs marked."""

from __future__ import annotations

import json
import re
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

NUM_SHOWN, NUM_READ = 12, 2000
MAX_CHARACTERS = 600
ALIKE = 0.6
"""Share of words in common below which an answer is marked as a whole: word by word nobody could read it."""


def choose_samples(run: Path) -> list[dict[str, Any]]:
    """Rows to show: as many the tuned model got wrong as right, if there are; the first of each, in their order."""
    path = run / "report" / "predictions.jsonl"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in islice(stream, NUM_READ)]
    wrong = [index for index, row in enumerate(rows) if row["tuned"].strip() != row["reference"].strip()]
    right = sorted(set(range(len(rows))) - set(wrong))
    num_wrong = min(len(wrong), max(NUM_SHOWN // 2, NUM_SHOWN - len(right)))
    chosen = sorted([*wrong[:num_wrong], *right[: NUM_SHOWN - num_wrong]])
    return [describe_sample(rows[index], index + 1) for index in chosen]


def describe_sample(row: dict[str, str], number: int) -> dict[str, Any]:
    """A prediction as the page shows it; its texts are escaped where they are marked."""
    return {
        "number": number,
        "prompt": shorten(row["prompt"]),
        "reference": shorten(row["reference"]),
        "base": mark_differences(shorten(row["base"]), shorten(row["reference"])),
        "tuned": mark_differences(shorten(row["tuned"]), shorten(row["reference"])),
        "is_right": row["tuned"].strip() == row["reference"].strip(),
    }


def mark_differences(answer: str, reference: str) -> Markup:
    """The answer as HTML: words the reference has not are marked, and those it lacks are struck out."""
    said, wanted = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (answer, reference))
    matcher = SequenceMatcher(None, said, wanted, autojunk=False)
    if matcher.ratio() < ALIKE:
        return Markup("<mark>{}</mark>").format(answer) if answer else Markup("")
    parts = []
    for kind, start, end, from_, to in matcher.get_opcodes():
        here, missing = escape("".join(said[start:end])), escape("".join(wanted[from_:to]))
        if kind == "equal":
            parts.append(here)
            continue
        if here:
            parts.append(Markup("<mark>{}</mark>").format(here))
        if missing.strip():
            parts.append(Markup("<del>{}</del>").format(missing))
    return Markup("").join(parts)


def shorten(text: str) -> str:
    """The text, without its middle where it is long."""
    text = text.strip()
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} […] {text[-half:]}"
