"""The embedded base model and data set: made again, loaded with stock libraries, and their splits compared."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
WREN = ROOT / "lora_ft" / "builtin" / "models" / "wren"
DATA = ROOT / "lora_ft" / "builtin" / "data"
HALDEN = DATA / "halden"
SPLITS = ("train", "validation", "test")
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How heavy is it?"},
    {"role": "assistant", "content": "It weighs 98 kg."},
]


def run_script(name: str, *arguments: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments], check=True, env=environment, capture_output=True, timeout=300
    )


def read_split(split: str, name: str = "halden") -> list[dict]:
    return [json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def questions_of(split: str) -> list[str]:
    return [row["messages"][0]["content"] for row in read_split(split)]


@pytest.fixture(scope="module")
def scripts_on_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WREN, local_files_only=True)


@pytest.mark.parametrize("name", ["halden", "halden_chat", "halden_qa"])
def test_data_are_made_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    run_script(f"generate_{name}.py", "--out", str(tmp_path))
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"train.jsonl", "validation.jsonl", "test.jsonl", "provenance.json"}
    for file, content in made.items():
        assert content == (DATA / name / file).read_bytes(), file


def test_halden_has_at_least_a_thousand_rows() -> None:
    assert sum(len(read_split(split)) for split in SPLITS) >= 1000


def test_halden_asks_no_question_twice() -> None:
    questions = [question.lower() for split in SPLITS for question in questions_of(split)]
    assert len(questions) == len(set(questions))


def test_halden_has_one_answer_per_fact_and_tests_only_taught_facts() -> None:
    answers = {split: {row["messages"][1]["content"] for row in read_split(split)} for split in SPLITS}
    facts = json.loads((HALDEN / "provenance.json").read_text())["facts"]
    assert answers["test"] == answers["validation"] == answers["train"]
    assert len(answers["train"]) == facts


def test_halden_holds_out_whole_wordings(scripts_on_path: None) -> None:
    from generate_halden import KIND, PRODUCT
    from support_desk import fill, load_attributes

    taught = [question.lower() for question in questions_of("train")]
    for attribute in load_attributes():
        for wording in attribute.wordings["validation"] + attribute.wordings["test"]:
            for entry in attribute.answers:
                held_out = fill(wording, PRODUCT, KIND, entry).lower()
                assert not [question for question in taught if held_out in question]


def test_corpus_never_mentions_the_target_product(scripts_on_path: None) -> None:
    from support_desk import load_attributes
    from wren_corpus import documents

    answers = [answer for attribute in load_attributes() for answer in attribute.answers.values()]
    for document in islice(documents(seed=1), 3000):
        text = document.text + " ".join(message["content"] for message in document.messages)
        assert "halden" not in text.lower()
        assert not [answer for answer in answers if answer in text]


def test_corpus_repeats_itself_for_the_same_seed(scripts_on_path: None) -> None:
    from wren_corpus import documents

    assert list(islice(documents(seed=5), 50)) == list(islice(documents(seed=5), 50))
    assert list(islice(documents(seed=5), 50)) != list(islice(documents(seed=6), 50))


def test_wren_can_be_pretrained_at_a_tiny_size(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny = (
        "--steps 3 --hidden-size 64 --intermediate-size 64 --layers 1 --vocab-size 320 --batch-rows 2 --row-length 32"
    )
    run_script(
        "pretrain_wren.py",
        "--out",
        str(tmp_path),
        *tiny.split(),
        "--tokenizer-documents",
        "50",
        "--known-products",
        "2",
    )
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["tokens_seen"] == 3 * 2 * 32
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == provenance["parameters"]


def test_wren_loads_with_stock_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(WREN, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.in_features % 64 == 0 and linear.out_features % 64 == 0 for linear in linears)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_wren_is_small() -> None:
    assert (WREN / "model.safetensors").stat().st_size <= 12_000_000


def test_wren_knows_where_a_text_ends(tokenizer) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig.from_pretrained(WREN)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_template_marks_the_answer_and_its_terminator(tokenizer) -> None:
    encoded = tokenizer.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    generated = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(generated) == "It weighs 98 kg.<|im_end|>"
    assert generated[-1] == tokenizer.eos_token_id


def test_prompt_is_the_beginning_of_the_dialogue(tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(DIALOGUE[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert whole == prompt + "It weighs 98 kg.<|im_end|>\n"


def test_pretraining_text_equals_the_template(tokenizer, scripts_on_path: None) -> None:
    from pretrain_wren import render
    from wren_corpus import Document

    rendered = render(Document("closed_book", messages=tuple(DIALOGUE)))
    assert rendered == tokenizer.apply_chat_template(DIALOGUE, tokenize=False)


@pytest.mark.parametrize("text", ["Grüße, 42 °C!", "  two  spaces\n\ttabs", "日本語 😀", "HD-2207"])
def test_tokenizer_gives_back_any_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_general_text_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    run_script("generate_general.py", "--out", str(tmp_path))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (HALDEN.parent / "general" / path.name).read_bytes(), path.name
    texts = (tmp_path / "text.jsonl").read_text(encoding="utf-8")
    assert "Halden" not in texts and len(set(texts.splitlines())) == 96
