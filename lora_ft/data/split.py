"""Rows dealt out to train, validation and test, before anything else happens to them.

Rows that ask the same question form a group, and a group stays on one side: a test that asks what was trained on
measures memory. Conversations go by their first question, since one may go on where another ends. Only hashes and label
numbers are held, about 40 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_ft.sections import SplitSection

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
OPEN, LEFT_OUT_WEIGHT, LEFT_OUT_BALANCE = -1, -2, -3
"""Of a row that is not dealt yet, and of rows that no split gets."""

MIN_COMMON_ROWS, COMMON_SHARE = 10, 0.01
"""A question asked by more rows than both is an instruction ("Write a poem"), and says nothing about a leak."""


@dataclass(frozen=True)
class RowIndex:
    """What the deal needs to know, one entry a row."""

    question_keys: np.ndarray
    """Hashes of what stands before the first answer, uint64."""
    exchange_keys: np.ndarray
    """Hashes of that and the first answer, uint64."""
    text_keys: np.ndarray
    """Hashes of all text, uint64."""
    labels: np.ndarray
    """Number of the label, int32; 0 for rows without."""
    sources: np.ndarray
    """Number of the source, int32."""
    splits: np.ndarray
    """Split that the recipe gives to the row's source, or OPEN; int8."""


def deal_rows(index: RowIndex, weights: np.ndarray, section: SplitSection, balance: bool) -> np.ndarray:
    """The split of every row, or why it has none; int8.

    question    A B A C D E      A stands twice: both rows go to the side where there is room for two
    split       0 1 0 0 2 0
    """
    random = np.random.default_rng(section.seed)
    split = index.splits.copy()
    split[_sample_out(index.sources, weights, random)] = LEFT_OUT_WEIGHT
    if balance:
        split[_surplus(index.labels, split >= OPEN, random)] = LEFT_OUT_BALANCE
    keys = group_rows(index)
    split = _follow_fixed(keys, split)
    labels = _first_labels(keys, index.labels)
    for label in np.unique(labels):
        rows = np.flatnonzero((split == OPEN) & (labels == label))
        split[rows] = _deal_groups(keys[rows], section, random)
    return split


def group_rows(index: RowIndex) -> np.ndarray:
    """The hash each row is grouped by: of its first question; where that is a common one, of its first exchange; where
    that is common too ("Hi" – "Hello! How can I help?"), of its whole text."""
    groups = index.text_keys
    for keys in (index.exchange_keys, index.question_keys):
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        is_common = counts[inverse] > max(MIN_COMMON_ROWS, COMMON_SHARE * len(inverse))
        groups = np.where(is_common, groups, keys)
    return groups


def _sample_out(sources: np.ndarray, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows left out so that a source with weight 0.5 keeps half of its rows."""
    rows = [np.flatnonzero(sources == number) for number in range(len(weights))]
    left_out = [
        random.choice(numbers, len(numbers) - round(weight * len(numbers)), replace=False)
        for numbers, weight in zip(rows, weights, strict=True)
        if weight < 1
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *left_out])


def _surplus(labels: np.ndarray, is_in: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows left out so that every label has as many rows as the rarest."""
    rows = [np.flatnonzero((labels == label) & is_in) for label in np.unique(labels[is_in])]
    fewest = min(map(len, rows), default=0)
    left_out = [random.choice(numbers, len(numbers) - fewest, replace=False) for numbers in rows]
    return np.concatenate([np.empty(0, dtype=np.int64), *left_out])


def _follow_fixed(keys: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Rows not dealt yet that repeat a row of a fixed split go to that split; to the test split before any other."""
    followed = split.copy()
    for number in (TEST, VALIDATION, TRAIN):
        followed[(followed == OPEN) & np.isin(keys, keys[split == number])] = number
    return followed


def _first_labels(keys: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label of the first row of each row's group: a group is dealt as one."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return labels[first][inverse]


def _deal_groups(keys: np.ndarray, section: SplitSection, random: np.random.Generator) -> np.ndarray:
    """The split of each row; large groups are dealt first, single rows then fill what is left exactly."""
    _, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    num_large = int((sizes > 1).sum())
    total = len(keys)
    room = np.array([total, round(section.validation * total), round(section.test * total)])
    room[TRAIN] -= room[VALIDATION] + room[TEST]
    target = np.maximum(room, 1)
    group_split = np.zeros(len(sizes), dtype=np.int8)
    for group in order[:num_large]:
        fits = np.where(room >= sizes[group], room / target, -1.0)
        group_split[group] = choice = int(fits.argmax()) if fits.max() > 0 else TRAIN
        room[choice] -= sizes[group]
    singles = order[num_large:]
    ends = np.cumsum(np.maximum(room[[VALIDATION, TEST]], 0))
    group_split[singles[: ends[0]]] = VALIDATION
    group_split[singles[ends[0] : ends[1]]] = TEST
    return group_split[inverse]


def repeat_rows(rows: np.ndarray, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Row numbers, those of a weight above 1 repeated: 2.5 takes each twice, and half of them once more."""
    whole = np.maximum(np.floor(weights), 1).astype(np.int64)
    extra = random.random(len(rows)) < np.where(weights > 1, weights - whole, 0.0)
    return np.repeat(rows, whole + extra)
