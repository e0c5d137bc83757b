"""Near duplicates: what shares most of its words is found, what does not is not."""

import numpy as np
import pytest

from lora_ft.data.duplicates import find_near_duplicates, find_runs, hash_runs, share_runs

WORDS = [f"word{n}" for n in range(400)]


def make_texts(count, length=60, seed=0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, length)) for _ in range(count)]


def change(text, number) -> str:
    words = text.split()
    for index in range(number):
        words[7 * index] = f"other{index}"
    return " ".join(words)


def is_similar(left, right) -> bool:
    return share_runs(find_runs(left), find_runs(right))


def find(texts):
    return find_near_duplicates(texts, len(texts), texts.__getitem__)


def test_slightly_changed_rows_are_found_and_others_are_not():
    texts = make_texts(500)
    changed = [change(text, 1) for text in texts[:100]]
    first = find(texts + changed)
    assert (first[:500] == np.arange(500)).all()
    assert (first[500:] == np.arange(100)).mean() >= 0.97
    assert all(is_similar(texts[first[500 + n]], changed[n]) for n in range(100) if first[500 + n] < 500)


@pytest.mark.parametrize(("number", "similar"), [(0, True), (1, True), (2, True), (6, False)])
def test_the_threshold(number, similar):
    (text,) = make_texts(1)
    assert is_similar(text, change(text, number)) is similar


def test_case_and_punctuation_do_not_matter():
    assert find(["The battery is full, now!", "the BATTERY is full now"]).tolist() == [0, 0]


def test_short_and_empty_texts():
    assert find(["", "ok", "no", "OK", ""]).tolist() == [0, 1, 2, 1, 0]
    assert find([]).tolist() == []


def test_scripts_without_spaces():
    text = "今日は天気がとても良いので散歩に行きましょうと彼女は言いました"
    assert find([text, text.replace("散歩", "買物"), "明日は雨が降るかもしれません"]).tolist()[2] == 2
    assert is_similar(text, text + "。") and not is_similar(text, "明日は雨が降るかもしれません")


def test_a_chain_of_likeness_has_one_first_row():
    texts = make_texts(1)
    for number in (1, 2, 3):
        texts.append(change(texts[0], number))
    assert find(texts).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "text", ["Don't STOP_it: e-mail 3.50 (or)", "".join(map(chr, range(128))), "one", "two words", "", " \n"]
)
def test_ascii_is_cut_into_the_words_it_has_in_any_other_text(text):
    """Two ways lead to words, a quick one for ASCII; a letter beyond ASCII behind the text takes the other."""
    alone, within = hash_runs(f"{text} a b c d"), hash_runs(f"{text} a b c é")
    np.testing.assert_array_equal(alone[:-1], within[:-1])
