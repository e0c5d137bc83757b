"""What is shown is what is trained on."""

import io

import pytest
from rich.console import Console

from lora_ft.data.preview import preview_rows, print_preview, write_preview
from lora_ft.errors import UserError
from tests.data.bases import make_sentencepiece, make_tokenizer

TURNS = [{"role": "user", "content": "Hi <b>\nthere 日本 😀"}, {"role": "assistant", "content": "Hello you"}]
ROWS = [{"messages": TURNS}] * 5


@pytest.mark.parametrize("tokenizer", [make_tokenizer("gemma"), make_sentencepiece("gemma", "gemma", "first")])
def test_tokens_spell_the_row_and_know_their_part(write_rows, tokenizer):
    rows = preview_rows(write_rows(ROWS), tokenizer, 2)
    assert len(rows) == 2 and rows[1].place.endswith("rows.jsonl:2")
    text = "".join(token.text for token in rows[0].tokens)
    assert text == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert "".join(token.text for token in rows[0].tokens if token.part == "learned") == "Hello you"
    assert [token.text for token in rows[0].tokens if token.part == "end"] == ["<end_of_turn>"]
    assert [i for token in rows[0].tokens for i in token.ids] == tokenizer.apply_chat_template(TURNS)["input_ids"]


def test_a_character_of_several_tokens_is_one_piece(write_rows):
    rows = preview_rows(write_rows(ROWS), make_tokenizer("gemma"), 1)
    assert not any("\ufffd" in token.text for token in rows[0].tokens)
    assert any(len(token.ids) > 1 for token in rows[0].tokens)


def test_rows_are_printed_with_a_summary(write_rows):
    tokenizer = make_tokenizer("gemma")
    console = Console(file=io.StringIO(), width=200)
    print_preview(preview_rows(write_rows(ROWS, max_length=24), tokenizer, 1), console, show_ids=True)
    text = console.file.getvalue()
    assert "rows.jsonl:1  24 tokens, " in text and "truncated" in text and "⏎" in text
    assert f" {tokenizer.bos_token_id} " in text and "learned" in text


def test_the_page_is_whole_and_escaped(write_rows, tmp_path):
    rows = preview_rows(write_rows(ROWS), make_tokenizer("gemma"), 3)
    write_preview(rows, tmp_path / "preview.html")
    page = (tmp_path / "preview.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and page.count("<h2>") == 3
    assert "&lt;end_of_turn&gt;" in page and "<b>" not in page
    assert "http" not in page


def test_bad_rows_are_refused(write_rows):
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        preview_rows(write_rows([{"oops": 1}]), make_tokenizer("gemma"))


def test_a_class_stands_behind_its_text(write_rows, tmp_path):
    rows = preview_rows(
        write_rows([{"text": "You won!", "label": "spam"}], task="classification"), make_tokenizer("gemma")
    )
    assert {token.part for token in rows[0].tokens} == {"read"} and rows[0].label == "spam"
    assert rows[0].summary.endswith("tokens, class spam")
    console = Console(file=io.StringIO(), width=200)
    print_preview(rows, console)
    assert "You won! spam" in console.file.getvalue()
    write_preview(rows, tmp_path / "preview.html")
    assert '<span class="learned" title=""> spam </span>' in (tmp_path / "preview.html").read_text("utf-8")


def test_an_answer_follows_what_the_encoder_reads(write_rows):
    tokenizer = make_tokenizer("gemma")
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    row = {"question": "Is it dry?", "context": "In Paris it is dry.", "answer": "yes<eos>"}
    (view,) = preview_rows(write_rows([row], task="seq2seq"), tokenizer)
    read, learned, end = ("".join(t.text for t in view.tokens if t.part == part) for part in ("read", "learned", "end"))
    assert "Is it dry?" in read and "In Paris it is dry." in read and "yes" not in read
    assert learned.endswith("yes") and end == "<eos>"


def test_few_rows_are_shown_as_they_are(write_rows):
    assert len(preview_rows(write_rows(ROWS[:1]), make_tokenizer("gemma"), 9)) == 1


def test_settings_are_checked_before_rows_are_shown(write_rows):
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.format: alpca"):
        preview_rows(write_rows(ROWS, source={"format": "alpca"}), make_tokenizer("gemma"))
