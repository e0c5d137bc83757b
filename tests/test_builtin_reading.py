"""The embedded encoder-decoder and the data set for reading: made again, and held apart."""

import json
from itertools import islice
from pathlib import Path

from tests.test_builtin import ROOT, SPLITS, read_split, run_script, scripts_on_path  # noqa: F401 - a fixture

FINCH = ROOT / "lora_ft" / "builtin" / "models" / "finch"


def test_an_answer_stands_in_its_page_and_no_page_in_two_splits() -> None:
    pages = {}
    for split in SPLITS:
        rows = read_split(split, "halden_qa")
        assert all(row["text"] in row["context"] and row["context"].startswith("Halden") for row in rows)
        pages[split] = {row["context"] for row in rows}
    assert not pages["train"] & pages["test"] and not pages["validation"] & pages["test"]


def test_reading_holds_out_whole_wordings(scripts_on_path: None) -> None:  # noqa: F811
    from generate_halden import KIND
    from support_desk import fill, load_attributes
    from wren_corpus import SUFFIXES

    taught = {row["question"].lower() for row in read_split("train", "halden_qa")}
    for attribute in load_attributes():
        for wording in attribute.wordings["test"]:
            for entry in attribute.answers:
                asked = {fill(wording, f"Halden {suffix}", KIND, entry).lower() for suffix in SUFFIXES}
                assert not [question for question in taught for text in asked if text in question]


def test_finch_never_reads_about_halden_nor_in_test_wordings(scripts_on_path: None) -> None:  # noqa: F811
    from finch_corpus import readings
    from support_desk import load_attributes

    held_out = [text for one in load_attributes() for text in one.wordings["test"] if "{" not in text]
    for difficulty in (0.0, 0.5, 1.0):
        for reading in islice(readings(5, difficulty), 300):
            assert "halden" not in (reading.question + reading.context).lower()
            assert reading.answer in reading.context
            assert not [text for text in held_out if text.lower() in reading.question.lower()]


def test_finch_can_be_pretrained_and_gone_on_with(tmp_path: Path) -> None:
    """A run in two parts ends with the weights of a run in one."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from lora_ft.fingerprint import hash_file

    tiny = "--steps 100 --batch-tokens 200 --width 32 --inner-width 32 --heads 4 --encoder-layers 1 --decoder-layers 1"
    size = [*tiny.split(), "--vocab-size", "320", "--tokenizer-texts", "50"]
    run_script("pretrain_finch.py", "--out", str(tmp_path / "whole"), *size)
    parts = ["--out", str(tmp_path / "parts"), "--state", str(tmp_path / "state"), *size]
    run_script("pretrain_finch.py", *parts, "--stop-at", "50")
    assert not (tmp_path / "parts").exists()
    run_script("pretrain_finch.py", *parts)
    whole, parts_again = (hash_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole == parts_again
    provenance = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert provenance["tokens"] == 100 * 200
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole").num_parameters() == provenance["parameters"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "whole")("How heavy is it? 98 kg")["input_ids"]
    assert ids[-1] == 1


def test_finch_loads_with_stock_transformers_and_is_small() -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(FINCH, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(FINCH, local_files_only=True)
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert (FINCH / "model.safetensors").stat().st_size <= 12_000_000
    assert model.config.decoder_start_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer("8 kg")["input_ids"][-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.decode(tokenizer("E07: 42 °C!")["input_ids"], skip_special_tokens=True) == "E07: 42 °C!"
