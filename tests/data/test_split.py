"""Rows are dealt out before anything else, and no question stands on both sides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.data.split import (
    LEFT_OUT_BALANCE,
    LEFT_OUT_WEIGHT,
    OPEN,
    TEST,
    TRAIN,
    VALIDATION,
    RowIndex,
    deal_rows,
    group_rows,
    repeat_rows,
)
from lora_ft.sections import SplitSection

ONE = np.ones(1)


def make_index(questions, texts=None, labels=None, sources=None, splits=None, exchanges=None) -> RowIndex:
    count = len(questions)
    texts = range(count) if texts is None else texts
    return RowIndex(
        np.array(questions, dtype=np.uint64),
        np.array(texts if exchanges is None else exchanges, dtype=np.uint64),
        np.array(texts, dtype=np.uint64),
        np.array([-1] * count if labels is None else labels, dtype=np.int32),
        np.array([0] * count if sources is None else sources, dtype=np.int32),
        np.array([OPEN] * count if splits is None else splits, dtype=np.int8),
    )


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0, 0), (0.5, 0.25), (0, 0.1)])
def test_shares_are_met_exactly_where_no_row_repeats(validation, test):
    dealt = deal_rows(make_index(range(1000)), ONE, SplitSection(validation, test), balance=False)
    assert np.bincount(dealt, minlength=3).tolist() == [
        1000 - 1000 * (validation + test),
        1000 * validation,
        1000 * test,
    ]


def test_the_deal_follows_the_seed():
    first, again, other = (deal_rows(make_index(range(500)), ONE, SplitSection(seed=seed), False) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_labels_keep_their_shares():
    labels = np.array([0] * 900 + [1] * 100)
    dealt = deal_rows(make_index(range(1000), labels=labels), ONE, SplitSection(0.1, 0.2), False)
    assert [int((labels[dealt == split] == 1).sum()) for split in (TRAIN, VALIDATION, TEST)] == [70, 10, 20]


@settings(max_examples=200, deadline=None)
@given(
    questions=st.lists(st.integers(0, 12), max_size=60),
    labels=st.lists(st.integers(0, 2), min_size=60, max_size=60),
    fixed=st.lists(st.sampled_from([OPEN, OPEN, OPEN, TRAIN, VALIDATION, TEST]), min_size=60, max_size=60),
    shares=st.sampled_from([(0.1, 0.1), (0.3, 0.3), (0.0, 0.5)]),
    balance=st.booleans(),
    weight=st.sampled_from([1.0, 0.5]),
)
def test_every_row_goes_somewhere_and_dealt_questions_stay_together(questions, labels, fixed, shares, balance, weight):
    index = make_index(questions, labels=labels[: len(questions)], splits=fixed[: len(questions)])
    dealt = deal_rows(index, np.array([weight]), SplitSection(*shares), balance)
    assert len(dealt) == len(questions)
    assert set(dealt.tolist()) <= {TRAIN, VALIDATION, TEST, LEFT_OUT_WEIGHT, LEFT_OUT_BALANCE}
    kept = dealt >= 0
    is_fixed = kept & (index.splits != OPEN)
    assert (dealt[is_fixed] == index.splits[is_fixed]).all()
    keys = group_rows(index)
    for key in set(keys.tolist()):
        group = kept & (keys == key)
        sides = set(dealt[group].tolist())
        assert len(sides) <= max(1, len(set(index.splits[group & is_fixed].tolist())))
    if balance and kept.any():
        assert len({int((index.labels[kept] == label).sum()) for label in set(index.labels[kept].tolist())}) == 1


def test_balance_takes_rows_of_the_frequent_labels_away():
    labels = np.array([0] * 4827 + [1] * 747)
    dealt = deal_rows(make_index(range(5574), labels=labels), ONE, SplitSection(0.1, 0.2), balance=True)
    assert [(labels[dealt == split] == 1).mean() for split in (TRAIN, VALIDATION, TEST)] == [0.5, 0.5, 0.5]
    assert np.bincount(dealt[dealt >= 0]).tolist() == [1046, 150, 298] and (dealt == LEFT_OUT_BALANCE).sum() == 4080


def test_a_row_that_repeats_a_fixed_one_follows_it():
    index = make_index([1, 1, 2, 2, 3, 3], splits=[TEST, OPEN, TRAIN, OPEN, VALIDATION, OPEN])
    assert deal_rows(index, ONE, SplitSection(0, 0), False).tolist() == [
        TEST,
        TEST,
        TRAIN,
        TRAIN,
        VALIDATION,
        VALIDATION,
    ]


def test_a_common_question_is_an_instruction_and_its_rows_go_by_their_text():
    index = make_index([7] * 100, texts=range(100))
    dealt = deal_rows(index, ONE, SplitSection(0.1, 0.1), False)
    assert np.bincount(dealt).tolist() == [80, 10, 10]


def test_rows_with_a_common_question_stay_together_by_their_first_answer_unless_that_is_common_too():
    questions, exchanges = [7] * 100 + [8] * 100, [*range(1000, 1050)] * 2 + [9] * 100
    groups = group_rows(make_index(questions, range(2000, 2200), exchanges=exchanges))
    assert groups.tolist() == [*exchanges[:100], *range(2100, 2200)]


def test_weights_below_one_leave_rows_out():
    index = make_index(range(100), sources=[0] * 60 + [1] * 40)
    dealt = deal_rows(index, np.array([0.5, 1.0]), SplitSection(0, 0), False)
    assert (dealt[:60] == LEFT_OUT_WEIGHT).sum() == 30 and (dealt[60:] == TRAIN).all()


def test_weights_above_one_repeat_rows():
    rows = np.arange(1000)
    repeated = repeat_rows(rows, np.where(rows < 500, 1.0, 2.5), np.random.default_rng(0))
    counts = np.bincount(repeated)
    assert (counts[:500] == 1).all() and set(counts[500:]) == {2, 3}
    assert abs(counts[500:].sum() - 1250) < 50
    assert (repeat_rows(rows, np.full(1000, 0.5), np.random.default_rng(0)) == rows).all()
