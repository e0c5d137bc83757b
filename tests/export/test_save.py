"""Adapters are saved whole or not at all, as stock PEFT reads them, with what is needed to know them again."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import CASES, add_adapter, make_base, make_tuned
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ft.builtin import locate_model
from lora_ft.errors import RunFailed
from lora_ft.export.manifest import read_manifest
from lora_ft.export.save import save_adapter
from lora_ft.fingerprint import hash_tensors, identify_base


def test_stock_peft_loads_it_and_says_the_same(plain):
    model = AutoModelForCausalLM.from_pretrained(plain.base.folder)
    reloaded = PeftModel.from_pretrained(model, plain.adapter).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**plain.inputs).logits, plain.logits())


def test_the_folder_holds_what_a_reload_needs(plain, tiny_base):
    names = {path.name for path in plain.adapter.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "lora_ft.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    messages = [{"role": "user", "content": "blinks"}]
    saved, trained = (AutoTokenizer.from_pretrained(folder) for folder in (plain.adapter, tiny_base))
    assert saved.apply_chat_template(messages, tokenize=False) == trained.apply_chat_template(messages, tokenize=False)


def test_the_manifest_knows_base_tensors_and_answers(plain):
    manifest = read_manifest(plain.adapter)
    assert manifest.base_fingerprint == plain.base.fingerprint
    assert manifest.tensors == hash_tensors(plain.adapter / "adapter_model.safetensors")
    assert set(manifest.files) == {path.name for path in plain.adapter.iterdir()} - {
        "adapter_model.safetensors",
        "lora_ft.json",
        "README.md",
    }
    assert manifest.arithmetic.dtype == "float32"
    assert manifest.arithmetic.quantization is None
    live = plain.logits()
    for row, sample in zip(live, manifest.samples, strict=True):
        assert sample.top_ids[0] == row[-1].argmax()
        assert sample.top_logits[0] == pytest.approx(row[-1].max().item(), abs=1e-5)
        targets = torch.tensor(sample.prompt[1:])
        expected = torch.log_softmax(row[:-1], -1).gather(1, targets[:, None]).mean().item()
        assert sample.mean_log_probability == pytest.approx(expected, abs=1e-5)


def test_recording_leaves_the_model_in_training_mode(plain, tmp_path):
    plain.model.train()
    try:
        save_adapter(plain.model, None, tmp_path / "adapter", base=plain.base, samples=[[1, 2, 3]])
        assert plain.model.training
    finally:
        plain.model.eval()


def test_a_folder_is_named_by_its_whole_path_and_a_hub_base_by_its_id(plain, tmp_path):
    config = json.loads((plain.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(plain.base.folder.absolute())
    assert config["inference_mode"] is True
    hub = identify_base("org/base", plain.base.folder, "0123abc")
    save_adapter(plain.model, None, tmp_path / "adapter", base=hub)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0123abc")


def test_a_builtin_base_is_named_by_the_folder_that_stock_peft_loads(tmp_path):
    folder = locate_model("builtin:wren")
    tuned = add_adapter(AutoModelForCausalLM.from_pretrained(folder), {"target_modules": ["q_proj"]})
    manifest = save_adapter(tuned, None, tmp_path / "adapter", base=identify_base("builtin:wren", folder))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert manifest.base == "builtin:wren"


def test_gathered_weights_are_saved_in_place_of_the_models_own(plain, tmp_path):
    """Under ZeRO-3 the model holds shards; what was gathered comes as a state dict of all its parameters."""
    gathered = {key: value.clone() for key, value in plain.model.state_dict().items()}
    key = next(key for key in gathered if "lora_B" in key)
    gathered[key] += 1
    save_adapter(plain.model, None, tmp_path / "adapter", base=plain.base, state_dict=gathered)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved[key.replace(".default", "")], gathered[key])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensor: torch.empty(0), "not gathered"),
        (lambda tensor: tensor * float("nan"), "must be finite"),
        (lambda tensor: tensor * 0, "changes nothing"),
    ],
    ids=["empty", "not finite", "zero"],
)
def test_what_is_no_adapter_is_not_saved(plain, tmp_path, spoil, reason):
    """Failure modes 39 and 43, and 18 at the last moment."""
    state = plain.model.state_dict()
    spoilt = {key: spoil(value) if "lora_B" in key else value for key, value in state.items()}
    with pytest.raises(RunFailed, match=reason):
        save_adapter(plain.model, None, tmp_path / "adapter", base=plain.base, state_dict=spoilt)
    assert list(tmp_path.iterdir()) == []


def test_modules_without_effect_are_named_not_refused(plain, tmp_path):
    """A vision tower that text alone never reached keeps its zeros, and the run its adapter."""
    state = {k: v * 0 if "layers.0" in k and "lora_B" in k else v for k, v in plain.model.state_dict().items()}
    manifest = save_adapter(plain.model, None, tmp_path / "adapter", base=plain.base, state_dict=state)
    assert len(manifest.idle_modules) == 7
    assert all("layers.0" in name for name in manifest.idle_modules)


def test_whole_embeddings_are_saved_only_if_the_vocabulary_grew(tmp_path):
    """PEFT stores an unchanged copy of the embeddings beside every LoRA on them."""
    lean = make_tuned(CASES["embeddings"], tmp_path / "lean")
    grown = make_tuned(CASES["resized"], tmp_path / "grown")
    assert not [key for key in load_file(lean.adapter / "adapter_model.safetensors") if "base_layer" in key]
    assert len(get_peft_model_state_dict(lean.model)) > len(load_file(lean.adapter / "adapter_model.safetensors"))
    saved = load_file(grown.adapter / "adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.weight"].shape[0] == 330
    assert read_manifest(grown.adapter).base_embeddings == 320


def test_an_earlier_adapter_survives_a_save_that_fails(plain, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(RunFailed):
        save_adapter(plain.model, None, copied, base=plain.base, state_dict={})
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_no_pickle_is_written(plain):
    """Failure mode 49."""
    assert not [path for path in plain.adapter.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_bf16_bases_are_recorded_as_such(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    tuned = add_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), {"target_modules": ["q_proj"]})
    manifest = save_adapter(tuned, None, tmp_path / "adapter", base=identify_base(str(base), base))
    assert manifest.arithmetic.dtype == "bfloat16"
