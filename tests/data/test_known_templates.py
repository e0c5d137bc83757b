"""Chat templates of real models, as TRL ships them: each gives exact masks, or says what it does to answers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import trl

from lora_ft.data.example import Example
from lora_ft.data.render import IGNORE_INDEX, Renderer
from lora_ft.errors import Fault, UserError
from lora_ft.sections import DataSection
from tests.data.bases import make_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
FILES = sorted(FOLDER.glob("*.jinja")) if FOLDER.is_dir() else []
TOKENS = re.compile(r"<\|[^|>\s]+\|>|<[a-z_]+>|</[a-z_]+>|\[/?[A-Z_]+\]|<｜[^｜]+｜>|<[a-z_]+\|>|<\|[a-z_]+>")
"""What looks like a special token in a template."""
NOT_SPECIAL = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
SECTION = DataSection(sources=())

TURNS = (
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No."},
)
REFUSALS = (
    "leaves out or rewrites",  # multimodal templates that want lists of parts
    "writes the inference prompt for this answer otherwise",  # prompts that open a thinking part
    "does not end this answer",  # other tokens end other turns
    "refuses the conversation",
)
WORK = {
    "llama3",
    "llama3_1",
    "qwen2_5",
    "qwen3",
    "qwen3_training",
    "gemma",
    "gemma3",
    "phi3",
    "phi3_5",
    "cohere",
    "lfm2",
}
"""Templates that must not be refused."""


def make_known(path: Path):
    source = path.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(None, family="mistral")
    special = sorted({*TOKENS.findall(source), "<|endoftext|>"} - NOT_SPECIAL)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("train_on", "num_turns"), [("assistant", 4), ("last", 4), ("assistant", 2)])
def test_masks_are_exact_or_the_template_is_named(path, train_on, num_turns):
    tokenizer = make_known(path)
    example = Example("rows:1", TURNS[:num_turns])
    try:
        renderer = Renderer(tokenizer, replace(SECTION, train_on=train_on))
        document = renderer.render([example])[0]
    except UserError as error:
        assert "data.chat_template" in str(error) and path.stem not in WORK
        return
    if isinstance(document, Fault):
        assert any(reason in document.rule for reason in REFUSALS) and path.stem not in WORK
        return
    prompt = renderer.render_prompt(example)
    assert document.input_ids[: len(prompt)] == prompt
    assert document.labels[len(prompt)] == document.input_ids[len(prompt)]
    learned = tokenizer.decode([label for label in document.labels if label != IGNORE_INDEX])
    assert "Hi there" not in learned and "More?" not in learned and example.reference in learned
    assert ("Hello you" in learned) is (train_on == "assistant" or num_turns == 2)
    assert set(document.labels).intersection(renderer.stop_token_ids)
    if "strftime_now" not in tokenizer.chat_template:
        compare_with_stock(
            tokenizer, example, prompt, document.input_ids, one_border=num_turns == 2 or train_on == "last"
        )


def compare_with_stock(tokenizer, example, prompt, whole, one_border):
    """The same text, and the same tokens but where stock merges over a border ("<think>\\n" + "\\n</think>")."""
    messages = list(example.messages)
    stock_prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    stock_whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.decode(whole) == tokenizer.decode(stock_whole)
    assert tokenizer.decode(prompt) == tokenizer.decode(stock_prompt)
    if one_border:
        assert prompt == stock_prompt
        assert (whole == stock_whole) is (stock_whole[: len(prompt)] == stock_prompt)
