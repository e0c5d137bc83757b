"""What goes with the weights makes chat, merged model and Modelfile render and stop as training did."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import add_adapter, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lora_ft.chat import _load
from lora_ft.data.render import Renderer
from lora_ft.data.template import ChatTemplate
from lora_ft.export.companions import set_defaults, with_defaults
from lora_ft.export.merge import merge_adapter
from lora_ft.export.save import save_adapter
from lora_ft.export.verify import verify_folder
from lora_ft.fingerprint import identify_base
from lora_ft.sections import DataSection
from tests.conftest import CHATML, make_tokenizer

END_OF_TEXT, END_OF_TURN = 0, 2
QUESTION = [{"role": "user", "content": "blinks"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "red"}]
THINKING = "\n {%- if x is defined and not x %}{{ y }}{% endif %}\nT" + CHATML
VARIABLES = {"x": False, "y": "é'{{\n", "date": None, "messages": [], "names": {"a": [1, 2.5]}, "eos_token": "END"}


def make_ending(folder: Path):
    """A model whose every answer is the end of a turn, and its base, which knows the end of a text alone."""
    make_base("llama", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[END_OF_TURN] = 1
    model.config.eos_token_id = model.generation_config.eos_token_id = END_OF_TEXT
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def save(model, tokenizer, folder: Path, **more) -> Path:
    base = folder / "base"
    tuned = add_adapter(model, {"target_modules": ["q_proj"]})
    save_adapter(tuned, tokenizer, folder / "adapter", base=identify_base(str(base), base), **more)
    return folder / "adapter"


def eos_ids(folder: Path):
    return json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")


@pytest.mark.parametrize("has_file", [True, False], ids=["generation config", "none"])
def test_every_answer_ends_where_training_ended_it(tmp_path, has_file):
    """Failure mode 3: the base stops on the end of a text, its template ends turns with another token."""
    model, tokenizer = make_ending(tmp_path / "base")
    if not has_file:
        (tmp_path / "base" / "generation_config.json").unlink()
    adapter = save(model, tokenizer, tmp_path)
    assert eos_ids(adapter) == [END_OF_TEXT, END_OF_TURN]
    merge_adapter(adapter, tmp_path / "merged", prove=False)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for folder in (adapter, tmp_path / "merged"):
        loaded, _, _ = _load(folder)
        written = loaded.generate(**inputs, max_new_tokens=9, pad_token_id=0)
        assert written[0, inputs["input_ids"].shape[1] :].tolist() == [END_OF_TURN]
    answer = pipeline("text-generation", model=str(tmp_path / "merged"))(
        QUESTION, max_new_tokens=9, return_tensors=True
    )
    assert answer[0]["generated_token_ids"][-2:].count(END_OF_TURN) == 1
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "merged" / "Modelfile").read_text()


def test_settings_of_the_base_that_transformers_only_warns_of_are_kept(tmp_path):
    """transformers refuses to save a changed config with a temperature and no sampling, and so after training."""
    model, tokenizer = make_ending(tmp_path / "base")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    model.generation_config.eos_token_id = [END_OF_TEXT, 7]
    adapter = save(model, tokenizer, tmp_path)
    assert json.loads((adapter / "generation_config.json").read_text())["temperature"] == 0.5
    assert eos_ids(adapter) == [END_OF_TEXT, 7, END_OF_TURN]


def test_a_tokenizer_whose_template_ends_no_answer_is_saved_all_the_same(tmp_path):
    model, tokenizer = make_ending(tmp_path / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert eos_ids(save(model, tokenizer, tmp_path)) == END_OF_TEXT


def test_variables_of_the_recipe_are_in_the_saved_template(tmp_path):
    """Failure mode 8: what `data.template_kwargs` did in training is done wherever the adapter goes."""
    model, tokenizer = make_ending(tmp_path / "base")
    tokenizer.chat_template = THINKING
    adapter = save(model, tokenizer, tmp_path, template_kwargs={"x": False, "y": "no thought"})
    merge_adapter(adapter, tmp_path / "merged", prove=False)
    trained = Renderer(tokenizer, DataSection((), template_kwargs={"x": False, "y": "no thought"})).template
    assert trained is not None and trained.render(ANSWERED).startswith("no thoughtT")
    for folder in (adapter, tmp_path / "merged"):
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.apply_chat_template(ANSWERED, tokenize=False) == trained.render(ANSWERED)
        assert saved.apply_chat_template(ANSWERED, tokenize=False, x=True).startswith("T"), "the caller's word counts"
    assert "no thought" in (tmp_path / "merged" / "Modelfile").read_text()
    assert tokenizer.chat_template == THINKING, "that of the caller is as it was"


@pytest.mark.parametrize(
    "source", [THINKING, "\n\n" + THINKING, "{{ names }}{{ date }}{{ y }}{{ eos_token }}" + CHATML]
)
def test_the_text_of_training_is_the_same_to_the_byte(source):
    tokenizer = make_tokenizer()
    trained = ChatTemplate(source, tokenizer, VARIABLES).render(ANSWERED)
    tokenizer.chat_template = source
    assert with_defaults(tokenizer, VARIABLES).apply_chat_template(ANSWERED, tokenize=False) == trained
    assert "messages" not in set_defaults(VARIABLES, {})


def test_every_named_template_comes_along(tmp_path):
    model, tokenizer = make_ending(tmp_path / "base")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}" + CHATML}
    adapter = save(model, tokenizer, tmp_path, template_kwargs={"x": 1})
    merge_adapter(adapter, tmp_path / "merged", prove=False)
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (adapter, tmp_path / "merged")]
    assert templates[0] == templates[1] and set(templates[0]) == {"default", "tool_use"}
    assert verify_folder(tmp_path / "merged", quick=True).ok
    (tmp_path / "merged" / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    assert not verify_folder(tmp_path / "merged", quick=True).ok


def test_of_base_and_adapter_one_tokenizer_comes_along_whole(tmp_path):
    """A special_tokens_map.json that only the base has would speak for the adapter's tokenizer too."""
    model, tokenizer = make_ending(tmp_path / "base")
    (tmp_path / "base" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_start|>"}))
    (tmp_path / "base" / "LICENSE").write_text("free")
    adapter = save(model, tokenizer, tmp_path)
    merge_adapter(adapter, tmp_path / "merged", prove=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == tokenizer.eos_token
    assert (tmp_path / "merged" / "LICENSE").read_text() == "free"
    save(model, None, tmp_path)
    merge_adapter(adapter, tmp_path / "again", prove=False)
    assert (tmp_path / "again" / "special_tokens_map.json").is_file(), "an adapter without one takes the base's"
