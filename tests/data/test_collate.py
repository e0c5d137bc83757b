"""Batches: padding by position, packed rows with positions instead of a mask."""

import torch

from lora_ft.data.collate import Collator
from lora_ft.data.render import IGNORE_INDEX

N = IGNORE_INDEX


def test_rows_are_padded_by_position_though_the_padding_token_ends_answers():
    batch = Collator(pad_token_id=2)(
        [{"input_ids": [5, 6, 2], "labels": [N, 6, 2]}, {"input_ids": [7, 2], "labels": [N, 2]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["labels"].tolist() == [[N, 6, 2], [N, 2, N]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_packed_rows_get_positions_and_no_mask():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6], "labels": [6], "seq_lengths": [1]},
    ]
    batch = Collator(pad_token_id=0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[N, 2, 3, N, 5], [N, N, N, N, N]]
    flat = Collator(pad_token_id=0, flatten=True)(rows)
    assert flat["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]


def test_classes_are_one_number_a_row():
    batch = Collator(pad_token_id=0)([{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3], "labels": 0}])
    assert batch["labels"].tolist() == [1, 0]


def test_answers_of_another_length_than_the_question():
    batch = Collator(pad_token_id=0)([{"input_ids": [1], "labels": [4, 5, 6]}, {"input_ids": [1, 2], "labels": [7]}])
    assert batch["input_ids"].shape == (2, 2) and batch["labels"].tolist() == [[4, 5, 6], [7, N, N]]
