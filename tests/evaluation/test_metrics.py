"""Metrics: ours by hand, the libraries' against the libraries, the user's own before anything is trained."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from lora_ft.errors import UserError, raise_faults
from lora_ft.evaluation.bootstrap import estimate_pair, ratio
from lora_ft.evaluation.compare import Prediction, score_answers, sum_up
from lora_ft.evaluation.metrics import METRICS, PACKAGES, check_metrics, choose_tokenizer, find_metric
from lora_ft.sections import EvaluationSection
from tests.evaluation.conftest import make_figure

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
    figure = score_answers(predictions, [name])[0][name]
    assert (figure.difference.value, figure.difference.low, figure.difference.high) == (0, 0, 0)
    assert figure.base.low <= figure.base.value <= figure.base.high


def test_own_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(answer, reference):\n    return len(answer) - len(reference)\n")
    address = f"{path}:length"
    assert not list(check_metrics([address]))
    figures, notes = score_answers([Prediction("?", "abc", "a", "abcde")], [address])
    figure = figures["mine.py:length"]
    assert notes == []
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
        ("{folder}/mine.py:of_nothing", "Given the answer '' and .*ZeroDivisionError"),
        ("{folder}/mine.py:in_common", "Given the answer 'an answer' and the reference 'other words', it returns nan"),
        ("{folder}/mine.py:said", "Given the answer '' and the reference 'an answer', it ends with IndexError"),
        ("{folder}/leaves.py:score", "ends with SystemExit: bye"),
    ],
)
def test_wrong_metrics_are_refused(tmp_path, name, message):
    """Failure mode 21."""
    (tmp_path / "mine.py").write_text(
        "def broken(a, r):\n    return 1 / 0\n"
        "def words(a, r):\n    return 'many'\n"
        "def endless(a, r):\n    return float('inf')\n"
        "def of_nothing(a, r):\n    return len(set(a) & set(r)) / len(a)\n"
        "def in_common(a, r):\n    return 1.0 if set(a.split()) & set(r.split()) or not a or not r else float('nan')\n"
        "def said(a, r):\n    return float(a.split()[0] in r)\n"
    )
    (tmp_path / "leaves.py").write_text("import sys\ndef score(a, r):\n    return 1.0\nsys.exit('bye')\n")
    with pytest.raises(UserError, match=message):
        raise_faults(check_metrics([name.format(folder=tmp_path)]))


def test_a_function_that_fails_on_a_real_answer_is_left_out(tmp_path):
    """After training nothing may end a run; and NaN is no JSON."""
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "def fails(a, r):\n    return 1 / (a != 'odd')\n"
        "def leaves(a, r):\n    return sys.exit('bye') if a == 'odd' else 1.0\n"
        "def unknown(a, r):\n    return float('nan') if a == 'odd' else 1.0\n"
        "def huge(a, r):\n    return 1e308 if 'rown' in a or a == 'odd' else 1.0\n"
    )
    names = [f"{tmp_path}/mine.py:{name}" for name in ("fails", "leaves", "unknown", "gone", "huge")]
    assert not list(check_metrics([*names[:3], names[4]]))
    predictions = (Prediction("?", "r", "brown", "brown"), Prediction("?", "r", "brown", "odd"))
    scores = np.ones((2, 3))
    compared = sum_up(predictions, (scores, scores), EvaluationSection(metrics=("exact_match", *names)))
    assert set(compared.figures) == {"loss", "perplexity", "token_accuracy", "exact_match"}
    starts = [f"mine.py:{name} is left out" for name in ("fails", "leaves", "unknown", "gone", "huge")]
    assert all(note.startswith(start) for note, start in zip(compared.notes, starts, strict=True)), compared.notes
    given = "(predictions.jsonl:2): Given the answer 'odd' and the reference 'r', it"
    assert f"{given} ends with ZeroDivisionError: division by zero." in compared.notes[0]
    assert f"{given} ends with SystemExit: bye." in compared.notes[1] and f"{given} returns nan." in compared.notes[2]
    json.dumps(compared.to_json(), allow_nan=False)


def test_tokens_without_a_finite_loss_are_left_out():
    scores = np.array([[np.nan, 1.0, 2.0]])
    compared = sum_up((), (scores, scores), EvaluationSection(), make_figure(float("nan"), 1.0))
    assert set(compared.figures) == {"token_accuracy"} and compared.general is None and compared.generation is None
    assert [note.partition(" is left out")[0] for note in compared.notes] == [
        "loss",
        "perplexity",
        "loss on general text",
    ]
    json.dumps(compared.to_json(), allow_nan=False)


def test_functions_of_one_name_are_told_apart(tmp_path):
    for folder, value in (("a", 1.0), ("b", 0.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "score.py").write_text(f"def f(a, r):\n    return {value}\ndef g(a, r):\n    return 2\n")
    names = [f"{tmp_path}/a/score.py:f", f"{tmp_path}/b/score.py:f", f"{tmp_path}/b/score.py:g"]
    figures, _ = score_answers([Prediction("?", "r", "b", "t")], names)
    assert {name: figure.tuned.value for name, figure in figures.items()} == {names[0]: 1, names[1]: 0, "score.py:g": 2}


def test_a_file_may_define_dataclasses_and_import_its_neighbour(tmp_path):
    (tmp_path / "lora_ft_neighbour.py").write_text("def one():\n    return 1.0\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from lora_ft_neighbour import one\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def score(a, r):\n    return Score(one()).value\n"
    )
    before = sys.path[:]
    assert value_of(f"{tmp_path}/mine.py:score", ["a"], ["b"]) == 1 and sys.path == before


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("की", "कि", 0),
        ("कि", "कि", 1),
        ("cafe\u0301", "café", 1),
        ("👍", "👎", 0),
        ("👍", "👍", 1),
        ("<", ">", 0),
        ("1.5", "5.1", 0),
        ("1,000.5 V", "1000.5 V.", 1 / 2),
        ("me a.b", "a me b", 1),
        ("我喜欢红色的花因为它很漂亮", "我喜欢红色的花因为它很美丽", 11 / 13),
        ("赤い花", "赤い GPT4 花", 6 / 7),
        ("๑๕", "๕๑", 0),
    ],
)
def test_words_of_any_script(answer, reference, expected):
    assert value_of("f1", [answer], [reference]) == pytest.approx(expected)
    if importlib.util.find_spec("rouge_score"):
        assert value_of("rouge1", [answer], [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        (["我喜欢红色的花因为它很漂亮", "GPT"], "zh"),
        (["赤い花が好きです"], "char"),
        (["ฉันชอบดอกไม้สีแดง"], "char"),
        (["the red light 红"], "13a"),
        (["लाल फूल"], "13a"),
        ([""], "13a"),
    ],
)
def test_bleu_counts_characters_where_no_spaces_stand_between_words(references, tokenizer):
    assert choose_tokenizer(references) == tokenizer
    library = pytest.importorskip("sacrebleu.metrics")
    answers = [reference[:-1] for reference in references]
    scorer = library.BLEU(force=True, tokenize=tokenizer)
    expected = scorer.corpus_score(answers, [references]).score / 100
    assert value_of("bleu", answers, references) == pytest.approx(expected, rel=1e-9)


def test_absent_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lora-ft\[metrics\]'"):
        raise_faults(check_metrics(["bleu"]))
    assert not list(check_metrics(name for name in METRICS if name not in PACKAGES))


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
