"""Modelfiles whose template and stop tokens are the tokenizer's own."""

import json

import pytest
from transformers import AutoTokenizer

from lora_ft.errors import UserError
from lora_ft.export.ollama import TRIALS, find_turns, render, render_modelfile, stop_texts, write_modelfile

LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ first }}{{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_base):
    """A tokenizer whose template is to be replaced."""
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.mark.parametrize("template", [None, LLAMA3, QWEN], ids=["chatml", "llama 3", "qwen, default system"])
def test_the_turns_render_what_the_template_renders(tokenizer, template):
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = find_turns(tokenizer)
    for messages in TRIALS:
        assert turns.render(messages) == render(tokenizer, messages, True)


def test_the_go_template_has_every_piece_in_its_branch(tokenizer):
    tokenizer.chat_template = QWEN
    assert find_turns(tokenizer).to_go() == (
        "{{ if not .System }}<|im_start|>system\nYou are helpful.<|im_end|>\n{{ end }}"
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        "{{ if $last }}<|im_start|>assistant\n{{ end }}"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        "{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}{{ end }}"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [(LLAMA2, "no plain sequence of turns"), ("{{ raise_exception('no') }}", "no plain sequence"), ("", "has none")],
    ids=["system inside the first turn", "raises", "none"],
)
def test_templates_that_are_more_than_turns_are_refused(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason):
        find_turns(tokenizer)


def test_stop_tokens_are_those_of_the_generation_config_and_the_tokenizer(tokenizer, tmp_path):
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert stop_texts(tokenizer, tmp_path) == ["<|im_start|>", "<|im_end|>"]
    text = render_modelfile(tokenizer, tmp_path)
    assert text.startswith('FROM ./model.gguf\n\nTEMPLATE """')
    assert text.endswith('PARAMETER stop "<|im_start|>"\nPARAMETER stop "<|im_end|>"\n')


def test_what_would_mean_something_else_in_a_modelfile_is_refused(tokenizer, tmp_path):
    tokenizer.chat_template = QWEN.replace("You are helpful.", "Say {{ '{{' }} twice.")
    with pytest.raises(UserError, match="means something else"):
        render_modelfile(tokenizer, tmp_path)


def test_a_folder_without_a_usable_template_gets_none_and_says_so(tokenizer, tmp_path):
    assert "there is no tokenizer" in write_modelfile(tmp_path)
    tokenizer.chat_template = LLAMA2
    tokenizer.save_pretrained(tmp_path)
    assert "no plain sequence" in write_modelfile(tmp_path)
    assert not (tmp_path / "Modelfile").exists()
