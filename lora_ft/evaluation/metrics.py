"""Metrics over generated answers: one line in `METRICS` each, or a user's own function.

A metric says what each row adds (`measure`) and what the sums mean (`finish`), so that corpus figures such as BLEU are
resampled like means.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from lora_ft.errors import Fault, UserError
from lora_ft.evaluation.bootstrap import Finish, ratio
from lora_ft.fingerprint import hash_json

RowScore = Callable[[str, str], float]
"""(answer, reference) → a score."""
Unit = Literal["share", "number"]
TRIALS = (("an answer", "an answer"), ("", "an answer"), ("an answer", "other words"), ("7", "an answer"))
"""Answers and references on which a user's function is tried: models say nothing, and something else."""
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = (
    f"{HAN}\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Thai and Lao, Khmer, Burmese
)
"""Scripts that put no spaces between words."""


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
    """Words of any script in lower case, without punctuation; a text that has none is one word.

    Vowel signs belong to their letter, and points and commas between digits to their number. Where a script puts no
    spaces between words, each letter is one.
    """
    text = unicodedata.normalize("NFC", text.lower()).strip()
    return (_word_pattern().findall(text) or [text]) if text else []


@cache
def _word_pattern() -> re.Pattern[str]:
    marks = "".join(sign for sign in map(chr, range(0x20000)) if unicodedata.category(sign).startswith("M"))
    extended = f"[{marks}\u200c\u200d]*"  # and what joins letters or keeps them apart
    unspaced = rf"(?=[^\W\d])[{UNSPACED}]"
    spaced = rf"(?:(?!{unspaced})\w{extended})+"
    return re.compile(rf"{unspaced}{extended}|{spaced}(?:(?<=\d)[.,](?=\d){spaced})*")


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


def sacrebleu(build: Callable[[Sequence[str]], Any]) -> Metric:
    """A corpus score of sacrebleu, over counts added up row by row, as a share of its 100 points.

    `build` gives the scorer for references.
    """

    def measure(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        return np.array(build(references)._extract_corpus_statistics(answers, [references]), dtype=float)

    def finish(sums: np.ndarray) -> float:
        return scorer._compute_score_from_stats([int(count) for count in sums]).score / 100

    scorer = build(())
    return Metric(measure, finish)


def build_bleu(references: Sequence[str]) -> Any:
    """BLEU over the words of most languages, over characters where most letters stand in a script without spaces."""
    from sacrebleu.metrics import BLEU

    return BLEU(force=True, tokenize=choose_tokenizer(references))


def build_chrf(references: Sequence[str]) -> Any:
    """chrF, whose characters are those of any script."""
    from sacrebleu.metrics import CHRF

    return CHRF()


def choose_tokenizer(references: Sequence[str]) -> str:
    """What sacrebleu calls the way to cut texts of the references' script: `13a`, `zh` or `char`."""
    text = "".join(references)
    letters, unspaced = (len(re.findall(pattern, text)) for pattern in (r"[^\W\d]", rf"(?=[^\W\d])[{UNSPACED}]"))
    if 2 * unspaced <= letters:
        return "13a"
    return "zh" if len(re.findall(f"[{HAN}]", text)) == unspaced else "char"


METRICS: dict[str, Callable[[], Metric]] = {
    "exact_match": mean_of(exact_match),
    "f1": mean_of(f1),
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "bleu": partial(sacrebleu, build_bleu),
    "chrf": partial(sacrebleu, build_chrf),
}
PACKAGES = {"rouge1": "rouge_score", "rouge2": "rouge_score", "rougeL": "rouge_score"} | dict.fromkeys(
    ("bleu", "chrf"), "sacrebleu"
)
"""Packages of the extra `metrics` that a metric needs."""
OWN_METRIC = "Write FILE.py:FUNCTION, where FUNCTION(answer, reference) returns a number, whatever a model may answer."


def check_metrics(names: Iterable[str]) -> Iterator[Fault]:
    """A wrong name or a function that cannot score; neither must be found after training."""
    for name in names:
        yield from _check_metric(name)


def _check_metric(name: str) -> Iterator[Fault]:
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
    """The metric of that name, or the user's `FILE.py:FUNCTION`.

    Raises:
        UserError: `load_function` refuses it; its `measure` raises one where an answer cannot be scored.
    """
    if ":" not in name:
        return METRICS[name]()
    function = load_function(name)

    def measure(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        pairs = enumerate(zip(answers, references, strict=True), 1)
        scores = [call_function(function, name, *pair, f"predictions.jsonl:{number}") for number, pair in pairs]
        return np.array([scores, [1.0] * len(scores)]).T

    return Metric(measure, unit="number")


def load_function(address: str) -> RowScore:
    """The user's function (answer, reference) → number, tried on `TRIALS`.

    Raises:
        UserError: no such file or function, or it does not return a finite number.
    """
    file, _, name = address.rpartition(":")
    if not Path(file).is_file():
        raise UserError("evaluation.metrics", address, f"There is no file {file}.", OWN_METRIC)
    try:
        function = getattr(_load_module(Path(file).resolve()), name)
    except (Exception, SystemExit) as fault:
        rule = f"Loading it ends with {type(fault).__name__}: {fault}."
        raise UserError("evaluation.metrics", address, rule, OWN_METRIC) from fault
    for answer, reference in TRIALS:
        call_function(function, address, answer, reference)
    return function


def _load_module(file: Path) -> ModuleType:
    """What the file defines; dataclasses look their module up, and files beside it can be imported."""
    spec = importlib.util.spec_from_file_location(f"lora_ft_metric_{hash_json(str(file))[:16]}", file)
    if spec is None or spec.loader is None:
        raise ImportError("this is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        with contextlib.suppress(ValueError):  # the file itself may have taken it out
            sys.path.remove(str(file.parent))
    return module


def call_function(
    function: RowScore, address: str, answer: str, reference: str, place: str = "evaluation.metrics"
) -> float:
    """What the user's function says of an answer.

    Raises:
        UserError: it fails, or does not return a finite number.
    """
    given = f"Given the answer {answer[:40]!r} and the reference {reference[:40]!r}, it"
    try:
        score = float(function(answer, reference))
    except (Exception, SystemExit) as fault:
        raise UserError(place, address, f"{given} ends with {type(fault).__name__}: {fault}.", OWN_METRIC) from fault
    if not math.isfinite(score):
        raise UserError(place, address, f"{given} returns {score}.", OWN_METRIC)
    return score
