"""Metrics over generated answers: one function and one line in `METRICS` each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lora_ft.errors import UserError

Metric = Callable[[str, str], float]
"""(answer, reference) → a score between 0 and 1."""


def exact_match(answer: str, reference: str) -> float:
    """1 where the answer is the reference, white space at the ends aside."""
    return float(answer.strip() == reference.strip())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of the words' precision and recall, without case and punctuation.

    Source: Rajpurkar et al. 2016, "SQuAD", section 6.1.
    """
    words, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
    shared = sum((words & wanted).values())
    total = sum(words.values()) + sum(wanted.values())
    return 2 * shared / total if total else 1.0


METRICS: dict[str, Metric] = {"exact_match": exact_match, "f1": f1}


def check_metrics(names: Iterable[str]) -> None:
    """Nothing, or a UserError that names the metrics there are: a wrong name must not be found after training."""
    for name in names:
        if name not in METRICS:
            raise UserError("evaluation.metrics", name, f"Known: {', '.join(METRICS)}.", "Choose among these.")


def score_answers(answers: Sequence[str], references: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    """The mean of each metric over all answers; empty where there are none."""
    if not answers:
        return {}
    return {
        name: sum(METRICS[name](a, r) for a, r in zip(answers, references, strict=True)) / len(answers)
        for name in names
    }
