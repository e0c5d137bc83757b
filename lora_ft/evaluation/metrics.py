"""Metrics over generated answers: one line in `METRICS` each, or a user's own function.

A metric says what each row adds (`measure`) and what the sums mean (`finish`), so that corpus figures such as BLEU are
resampled like means.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.evaluation.bootstrap import Finish, ratio

RowScore = Callable[[str, str], float]
"""(answer, reference) → a score."""
Unit = Literal["share", "number"]


@dataclass(frozen=True)
class Metric:
    """How answers are scored against references."""

    measure: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    """Answers and references, N of each, → what each row adds [N, k]."""
    finish: Finish = ratio
    """Sums over rows [k] → the figure."""
    unit: Unit = "share"
    """Whether the figure lies between 0 and 1 and reads as a percentage."""


def exact_match(answer: str, reference: str) -> float:
    """1 where the answer is the reference, white space at the ends aside."""
    return float(answer.strip() == reference.strip())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of the words' precision and recall, without case and punctuation.

    Source: Rajpurkar et al. 2016, "SQuAD", section 6.1.
    """
    words, wanted = (Counter(split_words(text)) for text in (answer, reference))
    shared = sum((words & wanted).values())
    total = sum(words.values()) + sum(wanted.values())
    return 2 * shared / total if total else 1.0


def split_words(text: str) -> list[str]:
    """Words of any script in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def mean_of(score: RowScore) -> Callable[[], Metric]:
    """A metric that is the mean of a score over rows."""
    return lambda: Metric(partial(_score_rows, score))


def _score_rows(score: RowScore, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    scores = [score(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return np.array([scores, [1.0] * len(scores)]).T


class _Words:
    """rouge-score's own tokenizer drops every letter that is not English."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def rouge(name: str) -> Metric:
    """ROUGE's F-measure, a mean over rows.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], tokenizer=_Words())
    return Metric(partial(_score_rows, lambda answer, reference: scorer.score(reference, answer)[name].fmeasure))


def sacrebleu(name: str, **options: Any) -> Metric:
    """A corpus score of sacrebleu, over counts added up row by row, as a share of its 100 points."""
    import sacrebleu.metrics as library

    scorer: Any = getattr(library, name)(**options)

    def measure(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        return np.array(scorer._extract_corpus_statistics(answers, [references]), dtype=float)

    def finish(sums: np.ndarray) -> float:
        return scorer._compute_score_from_stats([int(count) for count in sums]).score / 100

    return Metric(measure, finish)


METRICS: dict[str, Callable[[], Metric]] = {
    "exact_match": mean_of(exact_match),
    "f1": mean_of(f1),
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "bleu": partial(sacrebleu, "BLEU", force=True),
    "chrf": partial(sacrebleu, "CHRF"),
}
PACKAGES = {"rouge1": "rouge_score", "rouge2": "rouge_score", "rougeL": "rouge_score"} | dict.fromkeys(
    ("bleu", "chrf"), "sacrebleu"
)
"""Packages of the extra `metrics` that a metric needs."""


def check_metrics(names: Iterable[str]) -> None:
    """Nothing, or a UserError: a wrong name or a function that cannot score must not be found after training."""
    raise_faults(fault for name in names for fault in _find_faults(name))


def _find_faults(name: str) -> Iterator[Fault]:
    place = "evaluation.metrics"
    if ":" in name:
        try:
            load_function(name)
        except UserError as error:
            yield from error.faults
    elif name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f'Did you mean "{close[0]}"?' if close else "Choose among these, or give your own as FILE.py:FUNCTION."
        yield Fault(place, name, f"Known: {', '.join(METRICS)}.", hint)
    elif (package := PACKAGES.get(name)) and importlib.util.find_spec(package) is None:
        yield Fault(place, name, f"The package {package} is not installed.", "Run: pip install 'lora-ft[metrics]'")


def find_metric(name: str) -> Metric:
    """The metric of that name, or the user's `FILE.py:FUNCTION`."""
    return Metric(partial(_score_rows, load_function(name)), unit="number") if ":" in name else METRICS[name]()


def load_function(address: str) -> RowScore:
    """The user's function (answer, reference) → number, tried once.

    Raises:
        UserError: no such file or function, or it does not return a finite number.
    """
    file, _, name = address.rpartition(":")
    fix = "Write FILE.py:FUNCTION, where FUNCTION(answer, reference) returns a number."
    if not Path(file).is_file():
        raise UserError("evaluation.metrics", address, f"There is no file {file}.", fix)
    spec = importlib.util.spec_from_file_location(f"lora_ft_metric_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise UserError("evaluation.metrics", address, "This is no Python file.", fix)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
        score = float(function("an answer", "an answer"))
    except Exception as fault:
        rule = f"Tried on an answer that is its reference, it ends with {type(fault).__name__}: {fault}."
        raise UserError("evaluation.metrics", address, rule, fix) from fault
    if not math.isfinite(score):
        raise UserError("evaluation.metrics", address, f"Tried on an answer, it returns {score}.", fix)
    return function
