"""Rows that are too long: what is kept, by each policy, and what it cost."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.data.fitting import fit_document
from lora_ft.data.formats import convert_row
from lora_ft.data.render import IGNORE_INDEX, Renderer
from lora_ft.errors import Fault
from lora_ft.sections import DataSection
from tests.data.bases import make_tokenizer

CONTEXT = "In Paris it is dry. " * 10
QA = {"question": "Is it dry?", "context": CONTEXT, "answer": "yes"}


def fit(row, template="llama3", chat=True, **options):
    tokenizer = make_tokenizer(template, family=None if template else "llama3")
    section = DataSection(sources=(), **options)
    renderer = Renderer(tokenizer, section)
    example = convert_row(row, "rows:1", "auto", chat)
    document = renderer.render_one(example)
    return tokenizer, document, fit_document(document, example, section, renderer)


def learned(tokenizer, document) -> str:
    return tokenizer.decode([label for label in document.labels if label != IGNORE_INDEX])


def test_a_row_that_fits_is_left_alone():
    _, document, fitted = fit(QA, max_length=1000)
    assert fitted.documents == (document,) and not fitted.is_truncated


def test_keep_start_counts_an_answer_that_is_cut():
    _, document, fitted = fit({"prompt": "Hi", "completion": "yes no yes no"}, max_length=6)
    assert fitted.documents[0].input_ids == document.input_ids[:6]
    assert fitted.is_truncated and fitted.is_answer_cut


def test_keep_start_between_two_answers_cuts_none():
    messages = [{"role": role, "content": "Hello you"} for role in ("user", "assistant", "user", "assistant")]
    tokenizer, document, _ = fit({"messages": messages}, "chatml")
    end = document.labels.index(tokenizer.eos_token_id) + 3
    _, _, fitted = fit({"messages": messages}, "chatml", max_length=end)
    assert fitted.is_truncated and not fitted.is_answer_cut
    assert learned(tokenizer, fitted.documents[0]) == "Hello you<|im_end|>"


def test_keep_end_keeps_the_bos_and_the_terminator():
    tokenizer, document, fitted = fit(QA, max_length=20, truncation="keep_end")
    (kept,) = fitted.documents
    assert kept.input_ids == [tokenizer.bos_token_id, *document.input_ids[-19:]]
    assert learned(tokenizer, kept) == "yes<|eot_id|>" and not fitted.is_answer_cut


def test_keep_end_without_a_bos():
    _, document, fitted = fit(QA, "chatml", max_length=20, truncation="keep_end")
    assert fitted.documents[0].input_ids == document.input_ids[-20:]


def test_drop():
    assert fit(QA, max_length=20, truncation="drop")[2].documents == ()


@pytest.mark.parametrize("template", ["llama3", "chatml", None])
@pytest.mark.parametrize("max_length", [60, 75, 90])
def test_only_the_context_is_shortened(template, max_length):
    tokenizer, _, fitted = fit(QA, template, chat=bool(template), max_length=max_length, truncation="context")
    (kept,) = fitted.documents
    text = tokenizer.decode(kept.input_ids)
    assert max_length - 12 <= len(kept.input_ids) <= max_length
    assert fitted.is_truncated and not fitted.is_answer_cut
    assert "Is it dry?" in text and "In Paris it is dry." in text and learned(tokenizer, kept).startswith("yes<|")


def test_a_row_too_long_without_any_context_is_cut_like_others():
    _, _, fitted = fit(QA, max_length=12, truncation="context")
    assert len(fitted.documents[0].input_ids) == 12 and fitted.is_truncated


@settings(max_examples=30, deadline=None)
@given(words=st.integers(1, 60), limit=st.integers(4, 40))
def test_a_text_that_is_split_loses_no_token(words, limit):
    _, document, fitted = fit({"text": "yes no " * words}, max_length=limit, truncation="split")
    parts = fitted.documents
    assert all(len(part.input_ids) <= limit for part in parts) and not fitted.is_truncated
    joined = parts[0].input_ids + [token for part in parts[1:] for token in part.input_ids[1:]]
    assert joined == document.input_ids
    assert all(part.input_ids[0] == before.input_ids[-1] for before, part in pairwise(parts))
    assert sum(part.num_supervised_tokens for part in parts) == document.num_supervised_tokens


@pytest.mark.parametrize("row", [QA, {"prompt": "Hello you " * 20, "completion": "yes"}])
def test_rows_that_ask_something_are_not_split_and_say_so(row):
    _, document, fault = fit(row, max_length=20, truncation="split")
    assert isinstance(fault, Fault) and fault.value == f"{len(document.input_ids)} tokens" and "split" in fault.rule
    assert fit(row, max_length=1000, truncation="split")[2].documents
