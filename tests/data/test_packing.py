"""Packed documents do not see each other: the loss of each is what it is alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ft.data.collate import Collator
from lora_ft.data.packing import pack_documents, plan_rows
from lora_ft.data.render import IGNORE_INDEX, Document
from lora_ft.errors import UserError

VOCABULARY = 50


def make_documents(lengths, seed=0) -> list[Document]:
    random = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        ids = random.integers(2, VOCABULARY, length).tolist()
        cut = length // 3
        documents.append(Document(ids, [IGNORE_INDEX] * max(1, cut) + ids[max(1, cut) :], f"rows:{number}"))
    return documents


def as_rows(packed) -> list[dict]:
    return [{"input_ids": row.input_ids, "labels": row.labels, "seq_lengths": row.seq_lengths} for row in packed]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **shape)
    config._attn_implementation = request.param
    return LlamaForCausalLM(config).eval()


def token_losses(model, batch) -> torch.Tensor:
    """The loss of each position [B, S]; 0 where there is no target."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def document_losses(model, documents, row_length, batch_size, flatten) -> dict[int, float]:
    """The summed loss of each document when all are packed; found by its first four tokens."""
    numbers = {tuple(document.input_ids[:4]): number for number, document in enumerate(documents)}
    rows = as_rows(pack_documents(documents, row_length))
    found = {}
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        losses = token_losses(model, Collator(0, flatten=flatten)(chunk))
        lines = [losses[0]] if flatten else losses
        lengths = (
            [[n for row in chunk for n in row["seq_lengths"]]] if flatten else [row["seq_lengths"] for row in chunk]
        )
        ids = [[t for row in chunk for t in row["input_ids"]]] if flatten else [row["input_ids"] for row in chunk]
        for line, sizes, tokens in zip(lines, lengths, ids, strict=True):
            at = 0
            for size in sizes:
                found[numbers[tuple(tokens[at : at + 4])]] = line[at : at + size].sum().item()
                at += size
    return found


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_loss_of_each_document_is_its_loss_alone(model, batch_size, flatten):
    documents = make_documents([5, 9, 4, 17, 6, 24, 8, 11, 5])
    packed = document_losses(model, documents, 24, batch_size, flatten)
    assert sorted(packed) == list(range(len(documents)))
    for number, document in enumerate(documents):
        alone = token_losses(model, Collator(0)([{"input_ids": document.input_ids, "labels": document.labels}]))
        assert packed[number] == pytest.approx(alone.sum().item(), abs=2e-5)


def test_changing_one_document_leaves_the_loss_of_the_other(model):
    first, second = make_documents([7, 9])
    (changed,) = make_documents([7], seed=5)
    losses = []
    for neighbour in (first, changed):
        (row,) = as_rows(pack_documents([neighbour, second], 16))
        losses.append(token_losses(model, Collator(0)([row]))[0, 7:])
    assert torch.equal(*losses)


def test_padded_rows_of_any_padding_token_give_the_same_loss(model):
    documents = make_documents([5, 12])
    rows = [{"input_ids": d.input_ids, "labels": d.labels} for d in documents]
    together = token_losses(model, Collator(pad_token_id=documents[0].input_ids[-1])(rows)).sum(dim=1)
    for number, row in enumerate(rows):
        assert together[number].item() == pytest.approx(token_losses(model, Collator(0)([row])).sum().item(), abs=2e-5)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=80), row_length=st.integers(40, 90))
def test_every_document_is_packed_whole_and_once(lengths, row_length):
    plan = plan_rows(np.array(lengths, dtype=np.int64), row_length)
    assert sorted(int(number) for row in plan for number in row) == list(range(len(lengths)))
    assert [row.tolist() for row in plan] == sorted(sorted(row.tolist()) for row in plan)
    assert all(sum(lengths[number] for number in row) <= row_length for row in plan)
    half_empty = [row for row in plan if 2 * sum(lengths[number] for number in row) <= row_length]
    assert len(half_empty) <= 1, "two of them would have been one"


def test_rows_keep_tokens_labels_and_order_of_arrival():
    documents = make_documents([3, 2, 1, 6])
    rows = pack_documents(documents, 6)
    assert [row.seq_lengths for row in rows] == [[3, 2, 1], [6]]
    assert rows[0].input_ids == [token for document in documents[:3] for token in document.input_ids]
    assert rows[0].labels == [label for document in documents[:3] for label in document.labels]


def test_instruction_data_fills_its_rows():
    lengths = np.random.default_rng(0).gamma(3.0, 60.0, 5000).astype(np.int64) + 20
    plan = plan_rows(np.minimum(lengths, 1024), 1024)
    assert lengths.sum() / (len(plan) * 1024) > 0.98


def test_a_row_without_end_takes_no_more_memory_than_its_documents():
    assert len(plan_rows(np.array([3, 5, 4]), 10**12)) == 1
    assert len(plan_rows(np.array([], dtype=np.int64), 10**12)) == 0


def test_a_document_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"(?s)rows:1: 9 tokens.*at most 8.*data\.max_length"):
        pack_documents(make_documents([4, 9]), 8)
