"""Rows for a classifier and for an encoder with a decoder; those of running text are tested in `test_render`."""

import sys
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_ft.data.formats import convert_row
from lora_ft.data.prepare import build_splits
from lora_ft.data.tasks import build_task
from lora_ft.data.tokens import map_ahead
from lora_ft.errors import UserError
from lora_ft.sections import DataSection, SplitSection
from tests.data.bases import make_tokenizer

ALL_TRAIN = SplitSection(0, 0)
MAIL = [{"text": f"Hello {n} " + "you " * n, "label": "spam" if n % 3 else "ham"} for n in range(12)]
QA = [{"context": "it is dry " * 9, "question": f"is it {n}", "answer": "yes it is"} for n in ("dry", "wet", "mild")]


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, and an end token behind each text, as T5 has it."""
    words = ["it", "is", "dry", "yes", "wet", "mild", "question:", "context:", "answer:"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def test_classes_are_numbers_in_the_order_of_their_names(write_rows):
    tokenizer = make_tokenizer("llama3")
    splits = build_splits(write_rows(MAIL, task="classification", split=ALL_TRAIN), tokenizer)
    assert splits.report.labels == ("ham", "spam")
    assert splits.train["labels"][:] == [int(row["label"] == "spam") for row in MAIL]
    assert splits.train["input_ids"][:] == [tokenizer(row["text"])["input_ids"] for row in MAIL]
    assert splits.report.splits["train"].num_supervised_tokens == 12


def test_numeric_classes_are_ordered_as_numbers(write_rows):
    rows = [{"text": f"t{n}", "label": n} for n in (10, 9, 2, 2)]
    splits = build_splits(write_rows(rows, task="classification", split=ALL_TRAIN), make_tokenizer("llama3"))
    assert splits.report.labels == ("2", "9", "10") and splits.train["labels"][:] == [2, 1, 0, 0]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
def test_texts_to_classify_are_cut_around_their_special_tokens(write_rows, truncation):
    tokenizer = make_tokenizer("llama3")
    section = write_rows(MAIL, task="classification", split=ALL_TRAIN, max_length=8, truncation=truncation)
    rows, counts = build_splits(section, tokenizer).train, build_splits(section, tokenizer).report.splits["train"]
    assert all(len(ids) <= 8 and ids[0] == tokenizer.bos_token_id for ids in rows["input_ids"])
    if truncation == "drop":
        assert len(rows) + counts.num_dropped_too_long == 12
        return
    whole = tokenizer(MAIL[11]["text"])["input_ids"]
    expected = whole[:8] if truncation == "keep_start" else [whole[0], *whole[-7:]]
    assert rows["input_ids"][-1] == expected and counts.num_truncated > 0 and len(rows) == 12


def test_the_classic_balanced_spam_exercise(shared_data, write_rows):
    section = write_rows(MAIL, task="classification", balance=True, split=SplitSection(0.1, 0.2))
    source = replace(section.sources[0], path=str(shared_data / "SMSSpamCollection.tsv"))
    splits = build_splits(replace(section, sources=(source,)), make_tokenizer("llama3"))
    assert splits.report.num_kept == 747 + 747 and splits.report.num_left_out_balance == 5574 - 2 * 747
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [1046, 150, 298]
    for rows in (splits.train, splits.validation, splits.test):
        assert sum(rows["labels"]) == len(rows) // 2


def test_a_label_may_be_generated_instead(write_rows):
    tokenizer = make_tokenizer("llama3")
    splits = build_splits(write_rows(MAIL, split=ALL_TRAIN), tokenizer)
    row = splits.train[0]
    said = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert said == "ham<|eot_id|>" and splits.examples("train")[0].reference == "ham"


def test_questions_for_an_encoder_and_answers_for_a_decoder(write_rows):
    tokenizer = make_encoder_tokenizer()
    splits = build_splits(write_rows(QA, task="seq2seq", split=ALL_TRAIN), tokenizer)
    source = tokenizer.decode(splits.train[0]["input_ids"])
    assert source == "question: is it dry context: " + "it is dry " * 9 + "answer: </s>"
    assert tokenizer.decode(splits.train[0]["labels"]) == "yes it is </s>"


def test_only_the_context_of_a_question_is_cut(write_rows):
    tokenizer = make_encoder_tokenizer()
    section = write_rows(QA, task="seq2seq", split=ALL_TRAIN, max_length=16, truncation="context")
    splits = build_splits(section, tokenizer)
    for row in splits.train:
        text = tokenizer.decode(row["input_ids"])
        assert 14 <= len(row["input_ids"]) <= 16
        assert text.startswith("question: is it") and text.endswith("answer: </s>") and "context: it is dry" in text
    assert splits.report.splits["train"].num_truncated == 3


def test_an_answer_too_long_for_the_decoder_is_counted(write_rows):
    section = write_rows(QA, task="seq2seq", split=ALL_TRAIN, max_target_length=3)
    splits = build_splits(section, make_encoder_tokenizer())
    assert {len(labels) for labels in splits.train["labels"]} == {3}
    assert splits.report.splits["train"].num_answers_cut == 3
    with pytest.raises(UserError, match="dropped too long"):
        build_splits(replace(section, truncation="drop"), make_encoder_tokenizer())


def test_conversations_are_not_for_an_encoder(write_rows):
    rows = [{"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}]}]
    with pytest.raises(UserError, match="An encoder reads one question"):
        build_splits(write_rows(rows, task="seq2seq", split=ALL_TRAIN), make_encoder_tokenizer())


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_text_is_cut_between_its_special_tokens_as_the_tokenizer_cuts(truncation):
    tokenizer = make_encoder_tokenizer()
    tokenizer.truncation_side = "right" if truncation == "keep_start" else "left"
    section = DataSection(sources=(), task="classification", max_length=4, truncation=truncation)
    task = build_task(section, tokenizer, None, {"a": 0})
    (fitted,) = task.fit([convert_row({"text": "it is dry yes wet mild", "label": "a"}, "rows:1", "auto", False)])
    expected = tokenizer("it is dry yes wet mild", truncation=True, max_length=4)["input_ids"]
    assert fitted.documents[0].input_ids == expected and fitted.is_truncated


@pytest.mark.parametrize("task", ["classification", "seq2seq"])
def test_chunks_tokenised_at_once_do_not_cut_each_others_rows(task):
    """A tokenizer has one setting for truncation, which all threads see."""
    tokenizer = make_encoder_tokenizer()
    texts = ["it is dry " * (2 + 20 * (n % 2)) + "yes" for n in range(2000)]
    rows = [
        {"text": text, "label": "a"} if task == "classification" else {"prompt": text, "completion": "it is " * 10}
        for text in texts
    ]
    chunks = [[convert_row(row, "rows:1", "auto", False) for row in rows[i : i + 20]] for i in range(0, 2000, 20)]
    section = DataSection(sources=(), task=task, max_length=8, max_target_length=60)
    fit = build_task(section, tokenizer, None, {"a": 0}).fit
    alone = [fit(chunk) for chunk in chunks]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert list(map_ahead(fit, chunks)) == alone
    finally:
        sys.setswitchinterval(before)
    assert {len(fitted.documents[0].input_ids) for chunk in alone for fitted in chunk} == {8}
    if task == "seq2seq":
        assert {len(fitted.documents[0].labels) for chunk in alone for fitted in chunk} == {21}
