"""Metrics: ours by hand, the libraries' against the libraries, the user's own before anything is trained."""

import importlib.util

import numpy as np
import pytest

from lora_ft.errors import UserError
from lora_ft.evaluation.bootstrap import estimate_pair, ratio
from lora_ft.evaluation.compare import Prediction, score_answers
from lora_ft.evaluation.metrics import METRICS, PACKAGES, check_metrics, find_metric

ANSWERS = ["the red light blinks", "it is 40 volts.", "", "die grüne Lampe"]
REFERENCES = ["a red light blinks twice", "it is 40 volts.", "no", "die grüne Lampe leuchtet"]


def value_of(name, answers, references):
    metric = find_metric(name)
    return metric.finish(metric.measure(answers, references).sum(0))


def test_exact_match_and_f1():
    assert value_of("exact_match", ["a b", " c "], ["a b", "d"]) == 0.5
    assert value_of("f1", ["The red light."], ["a red light"]) == pytest.approx(2 / 3)
    assert value_of("f1", ["", "x"], ["", ""]) == 0.5


def test_rouge_counts_words_of_any_script():
    pytest.importorskip("rouge_score")
    assert value_of("rouge1", ["die grüne Lampe"], ["die grüne Lampe leuchtet"]) == pytest.approx(2 * 0.75 / 1.75)
    assert value_of("rougeL", ["красный свет"], ["свет красный"]) == 0.5, "the longest common run in order is one word"
    assert value_of("rouge2", ["a b c"], ["a b d"]) == 0.5


@pytest.mark.parametrize(("name", "kind"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_corpus_scores_are_those_of_sacrebleu(name, kind):
    library = pytest.importorskip("sacrebleu.metrics")
    expected = getattr(library, kind)().corpus_score(ANSWERS, [REFERENCES]).score / 100
    assert value_of(name, ANSWERS, REFERENCES) == pytest.approx(expected, rel=1e-9)
    assert 0 < expected < 1


@pytest.mark.parametrize("name", ["bleu", "chrf", "rougeL", "f1"])
def test_the_same_answers_differ_by_nothing(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    predictions = [Prediction("?", r, a, a) for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    figure = score_answers(predictions, [name])[name]
    assert (figure.difference.value, figure.difference.low, figure.difference.high) == (0, 0, 0)
    assert figure.base.low <= figure.base.value <= figure.base.high


def test_own_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(answer, reference):\n    return len(answer) - len(reference)\n")
    address = f"{path}:length"
    check_metrics([address])
    figures = score_answers([Prediction("?", "abc", "a", "abcde")], [address])
    figure = figures["mine.py:length"]
    assert (figure.base.value, figure.tuned.value, figure.unit) == (-2, 2, "number")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("accuracyy", "Known: exact_match"),
        ("rouge", 'Did you mean "rouge'),
        ("/nowhere/mine.py:score", "There is no file"),
        ("{folder}/mine.py:nonesuch", "AttributeError"),
        ("{folder}/mine.py:broken", "ZeroDivisionError"),
        ("{folder}/mine.py:words", "ValueError"),
        ("{folder}/mine.py:endless", "returns inf"),
    ],
)
def test_wrong_metrics_are_refused(tmp_path, name, message):
    """Failure mode 21."""
    (tmp_path / "mine.py").write_text(
        "def broken(a, r):\n    return 1 / 0\n"
        "def words(a, r):\n    return 'many'\n"
        "def endless(a, r):\n    return float('inf')\n"
    )
    with pytest.raises(UserError, match=message):
        check_metrics([name.format(folder=tmp_path)])


def test_absent_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lora-ft\[metrics\]'"):
        check_metrics(["bleu"])
    check_metrics(name for name in METRICS if name not in PACKAGES)


def test_intervals_hold_the_truth_in_nineteen_cases_of_twenty():
    """Two models that are right in 70% and 80% of rows, 200 rows drawn 200 times: 95%, give or take 4.5%."""
    rng, holds, widths = np.random.default_rng(7), 0, []
    for _ in range(200):
        base = np.stack([rng.random(200) < 0.7, np.ones(200)], axis=1).astype(float)
        tuned = np.stack([np.where(base[:, 0] == 1, rng.random(200) < 0.95, rng.random(200) < 0.45), np.ones(200)], 1)
        paired = estimate_pair(base, tuned, ratio)
        holds += paired.difference.low <= 0.1 <= paired.difference.high
        widths.append(paired.difference.high - paired.difference.low)
    assert 181 <= holds <= 199
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.16 / 200), rel=0.1), "0.16: variance of a difference"


def test_tokens_weigh_alike_in_a_ratio():
    rows = np.array([[2.0, 1.0], [3.0, 3.0]])
    paired = estimate_pair(rows, rows + np.array([1, 0]), ratio)
    assert paired.base.value == 5 / 4 and paired.difference.value == 2 / 4
