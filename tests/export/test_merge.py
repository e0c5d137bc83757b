"""Every kind of adapter merges to the logits of base + adapter; what cannot be merged is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, CONFIGS, SHAPE, TASKS, Case, add_adapter, make_base, make_tuned
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Qwen3_5Config

from lora_ft.errors import UserError
from lora_ft.export.merge import merge_adapter
from lora_ft.export.save import save_adapter
from lora_ft.export.verify import verify_folder
from lora_ft.fingerprint import identify_base

ATOL = 1e-4  # issue: "within 1e-4 (fp32)"


def load_merged(folder, cls=AutoModelForCausalLM, **options):
    """The merged model as anyone loads it, and nothing of it missing or left over."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_adapter_merges_to_its_logits(name, tmp_path):
    case = CASES[name]
    tuned = make_tuned(case, tmp_path)
    live = tuned.logits()
    assert verify_folder(tuned.adapter, quick=True).ok

    report = merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    merged = load_merged(tmp_path / "merged", TASKS[case.task])
    with torch.no_grad():
        found = merged(**tuned.inputs).logits
    assert torch.allclose(found, live, atol=ATOL, rtol=0)
    assert bool(report.untied) == case.untied
    assert verify_folder(tmp_path / "merged", quick=True).ok
    if not case.num_embeddings:
        with torch.no_grad(), tuned.model.disable_adapter():
            effect = (tuned.model(**tuned.inputs).logits - live).abs().max()
        assert effect > 100 * ATOL, "the adapter must do something for the comparison to mean anything"


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "dora", "gpt2", "gpt2_dora", "embeddings", "lora_bias"])
def test_bytes_equal_those_of_pefts_merge_in_fp32(name, tmp_path):
    tuned = make_tuned(CASES[name], tmp_path)
    merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    tuned.model.merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "peft"))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_bf16_bytes_equal_pefts_merge_in_fp32_rounded_once(tmp_path):
    """PEFT's own bf16 merge rounds twice, the update and the sum; ours is its fp32 merge, rounded at the end."""
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    tuned = add_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), CASES["lora"].lora)
    save_adapter(tuned, None, tmp_path / "adapter", base=identify_base(str(base), base))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", prove=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = {key: value.to(torch.bfloat16) for key, value in tuned.merge_and_unload().state_dict().items()}
    assert report.dtype == "bfloat16"
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_stored_and_loaded(plain, tmp_path, dtype):
    report = merge_adapter(plain.adapter, tmp_path / "merged", dtype=dtype, prove=False)
    assert {str(t.dtype) for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert report.dtype == dtype
    assert str(load_merged(tmp_path / "merged", dtype="auto").dtype) == f"torch.{dtype}"


def test_sharded_bases_keep_their_shards_and_get_a_true_index(plain, tmp_path):
    base = make_base("llama", tmp_path / "base", max_shard_size="200KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    report = merge_adapter(plain.adapter, tmp_path / "merged", base=str(base), prove=False)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = {path.name for path in base.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files == {p.name for p in (tmp_path / "merged").glob("*.safetensors")}
    for file in files:
        held = load_file(tmp_path / "merged" / file)
        assert sorted(held) == sorted(name for name, where in index["weight_map"].items() if where == file)
    assert index["metadata"]["total_size"] == report.total_bytes
    with torch.no_grad():
        assert torch.allclose(load_merged(tmp_path / "merged")(**plain.inputs).logits, plain.logits(), atol=ATOL)


def test_tokenizer_template_and_configs_come_along(plain, tmp_path):
    """Failure mode 42: stock loading renders and answers as in training."""
    shutil.copytree(plain.base.folder, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("free")
    (tmp_path / "base" / "modeling_own.py").write_text("# custom code")
    merge_adapter(plain.adapter, tmp_path / "merged", base=str(tmp_path / "base"), prove=False)
    merged, trained = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", plain.adapter))
    messages = [{"role": "user", "content": "what is green?"}]
    text = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for tokenizer in (merged, trained)]
    assert text[0] == text[1]
    for name in (
        "LICENSE",
        "modeling_own.py",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
        "Modelfile",
    ):
        assert (tmp_path / "merged" / name).is_file(), name
    unchanged = json.loads((plain.base.folder / "config.json").read_text())
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == unchanged


def test_generation_settings_of_training_win_over_those_of_the_base(plain, copied, tmp_path):
    """Failure mode 3: the token that ends a turn stays the one that generation stops at."""
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 7]}))
    merge_adapter(copied, tmp_path / "merged", prove=False)
    assert load_merged(tmp_path / "merged").generation_config.eos_token_id == [2, 7]


def test_untying_is_written_to_the_config(tmp_path):
    tuned = make_tuned(CASES["tied_head"], tmp_path)
    merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is False
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tuned.base.folder / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(weights["lm_head.weight"], base["model.embed_tokens.weight"])


def test_a_classifier_keeps_its_labels_and_drops_the_language_head(tmp_path):
    tuned = make_tuned(CASES["classifier"], tmp_path)
    report = merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert report.left_out == ("lm_head.weight",)
    assert config.architectures == ["LlamaForSequenceClassification"]
    assert config.num_labels == 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_several_adapters_are_summed_with_their_weights(plain, tmp_path):
    other = add_adapter(AutoModelForCausalLM.from_pretrained(plain.base.folder), {"target_modules": ["q_proj"], "r": 2})
    save_adapter(other, None, tmp_path / "other", base=plain.base)
    merge_adapter([(plain.adapter, 0.25), (tmp_path / "other", -2.0)], tmp_path / "both", prove=False)
    alone = {}
    for name, folder in (("first", plain.adapter), ("second", tmp_path / "other")):
        merge_adapter(folder, tmp_path / name, prove=False)
        alone[name] = load_file(tmp_path / name / "model.safetensors")
    base, both = (load_file(f / "model.safetensors") for f in (plain.base.folder, tmp_path / "both"))
    for key, weight in both.items():
        expected = base[key] + 0.25 * (alone["first"][key] - base[key]) - 2.0 * (alone["second"][key] - base[key])
        assert torch.allclose(weight, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "saved_modules", "tokens"])
def test_adapters_that_do_more_than_add_have_no_fraction(name, tmp_path):
    tuned = make_tuned(CASES[name], tmp_path)
    with pytest.raises(UserError, match="no sum with that of another adapter and no fraction"):
        merge_adapter([(tuned.adapter, 0.5)], tmp_path / "merged", prove=False)
    with pytest.raises(UserError, match="no sum with that of another adapter and no fraction"):
        merge_adapter([(tuned.adapter, 1.0), (tuned.adapter, 1.0)], tmp_path / "merged", prove=False)
    assert not (tmp_path / "merged").exists()


REFUSED = {
    "alora_invocation_tokens": {"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 7]},
    "velora_config": {"target_modules": ["q_proj"], "velora_config": {}},
    "init_lora_weights: pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "layer_replication": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_no_fixed_change_is_refused_by_name(setting, tmp_path):
    tuned = make_tuned(Case("llama", REFUSED[setting]), tmp_path)
    with pytest.raises(UserError, match=setting):
        merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    assert list(tmp_path.glob("*merged*")) == []


@pytest.mark.parametrize("damage", ["missing", "extra", "renamed", "misshapen"])
def test_adapter_keys_that_do_not_match_are_fatal(copied, tmp_path, damage):
    """Failure mode 39: PEFT only warns. Of another tool's adapter nothing says what it was."""
    (copied / "lora_ft.json").unlink()
    tensors = load_file(copied / "adapter_model.safetensors")
    key = next(iter(tensors))
    changes = {
        "missing": lambda: tensors.pop(key),
        "extra": lambda: tensors.update({key.replace("layers.0", "layers.7"): tensors[key].clone()}),
        "renamed": lambda: tensors.update({key.replace("lora_A", "lora_a"): tensors.pop(key)}),
        "misshapen": lambda: tensors.update({key: torch.cat([tensors[key], tensors[key]])}),
    }
    changes[damage]()
    save_file(tensors, copied / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"missing|unexpected|of another shape"):
        merge_adapter(copied, tmp_path / "merged", prove=False)


def test_another_base_of_the_same_shape_is_refused(plain, tmp_path):
    """Failure mode 41."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another base"):
        merge_adapter(plain.adapter, tmp_path / "merged", base=str(tmp_path / "other"), prove=False)


def test_a_quantised_base_is_refused(plain, tmp_path):
    """Failure mode 40: an update added to 4-bit numbers would be rounded away."""
    shutil.copytree(plain.base.folder, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    manifest = json.loads((plain.adapter / "lora_ft.json").read_text())
    shutil.copytree(plain.adapter, tmp_path / "adapter")
    manifest["base_fingerprint"] = identify_base("base", tmp_path / "base").fingerprint
    (tmp_path / "adapter" / "lora_ft.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="quantised with gptq"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"), prove=False)


def test_pickled_adapters_are_not_opened(copied, tmp_path):
    """Failure mode 49."""
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    with pytest.raises(UserError, match="Pickled weights"):
        merge_adapter(copied, tmp_path / "merged", prove=False)


def test_adapters_of_other_tools_merge_too(plain, tmp_path):
    plain.model.save_pretrained(tmp_path / "peft")
    shutil.copytree(plain.base.folder, tmp_path / "base")
    report = merge_adapter(tmp_path / "peft", tmp_path / "merged", base=str(tmp_path / "base"), prove=False)
    assert report.verdict == "not measured"
    with torch.no_grad():
        assert torch.allclose(load_merged(tmp_path / "merged")(**plain.inputs).logits, plain.logits(), atol=ATOL)


def test_values_too_large_for_the_type_are_an_error(plain, tmp_path):
    from lora_ft.errors import RunFailed

    base = shutil.copytree(plain.base.folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 1e6)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    tuned = add_adapter(AutoModelForCausalLM.from_pretrained(base), CASES["lora"].lora)
    save_adapter(tuned, None, tmp_path / "adapter", base=identify_base(str(base), base))
    with pytest.raises(RunFailed, match=r"model\.norm\.weight"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float16", prove=False)
    assert not (tmp_path / "merged").exists()


def test_a_vision_tower_that_text_never_reached_is_kept(tmp_path):
    """The text part of a multimodal base is trained; the merged model is the whole base again, of its own class."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    text = {**SHAPE, "num_hidden_layers": 4, "head_dim": 16}
    whole = AutoModelForImageTextToText.from_config(Qwen3_5Config(text_config=text, vision_config=vision))
    whole.save_pretrained(tmp_path / "base")
    tuned = add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CASES["lora"].lora)
    identity = identify_base(str(tmp_path / "base"), tmp_path / "base")
    ids = torch.tensor([[5, 6, 7, 8]])
    save_adapter(tuned, None, tmp_path / "adapter", base=identity, samples=ids.tolist())
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert report.verdict == "equal"
    held = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged")]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][key], held[1][key]) for key in held[0] if "visual" in key)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.architectures == ["Qwen3_5ForConditionalGeneration"]
    load_merged(tmp_path / "merged", AutoModelForImageTextToText)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_base_runs_only_when_allowed(plain, tmp_path):
    """Failure mode 49: remote code only by explicit opt-in."""
    base = shutil.copytree(plain.base.folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(OWN_CODE)
    tuned = add_adapter(AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), CASES["lora"].lora)
    save_adapter(tuned, None, tmp_path / "adapter", base=identify_base(str(base), base))
    with pytest.raises(UserError, match="brings its own Python code"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", prove=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", prove=False, trust_remote_code=True)
    assert [f.name for f in verify_folder(tmp_path / "merged", quick=True).findings if not f.ok] == ["keys"]
    assert verify_folder(tmp_path / "merged", quick=True, trust_remote_code=True).ok
    with torch.no_grad():
        merged = load_merged(tmp_path / "merged", trust_remote_code=True)(**plain.inputs).logits
        assert torch.allclose(merged, tuned(**plain.inputs).logits, atol=ATOL)


def test_nothing_but_an_earlier_merge_is_replaced(plain, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="would be replaced"):
        merge_adapter(plain.adapter, tmp_path / "thesis", prove=False)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    for _ in range(2):
        merge_adapter(plain.adapter, tmp_path / "merged", prove=False)


def test_a_merged_model_of_another_adapter_is_not_replaced_but_by_its_own_run(plain, copied, tmp_path):
    merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    before = (tmp_path / "merged" / "merge_report.json").read_text()
    with pytest.raises(UserError, match="earlier merge of this lies there"):
        merge_adapter([(plain.adapter, 0.5)], tmp_path / "merged", prove=False)
    assert (tmp_path / "merged" / "merge_report.json").read_text() == before
    (tmp_path / "run.json").write_text("{}")
    own = copied.with_name("merged")
    assert own == tmp_path / "merged"
    merge_adapter([(copied, 0.5)], tmp_path / "half", prove=False)
    with pytest.raises(UserError, match="earlier merge of this lies there"):
        merge_adapter([(copied, 0.5)], own, prove=False)
    trained_on = {key: 2 * tensor for key, tensor in load_file(copied / "adapter_model.safetensors").items()}
    save_file(trained_on, copied / "adapter_model.safetensors")
    (copied / "lora_ft.json").unlink()
    merge_adapter(copied, own, prove=False)
    assert (tmp_path / "merged" / "merge_report.json").read_text() != before
    (tmp_path / "half" / "merge_report.json").write_text("{")
    with pytest.raises(UserError, match="earlier merge of this lies there"):
        merge_adapter([(copied, 0.5)], tmp_path / "half", prove=False)


def test_a_merged_model_takes_no_place_in_which_its_adapter_lies(plain, tmp_path):
    merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    inner = shutil.copytree(plain.adapter, tmp_path / "merged" / "adapter")
    with pytest.raises(UserError, match="lies inside of it, and would be lost"):
        merge_adapter(inner, tmp_path / "merged", prove=False)
    assert (inner / "adapter_model.safetensors").is_file()
    (tmp_path / "notes").write_text("")
    with pytest.raises(UserError, match="notes is a file"):
        merge_adapter(plain.adapter, tmp_path / "notes" / "merged", prove=False)


@pytest.mark.parametrize("place", ["", "merged", "a/b"])
def test_a_merged_model_does_not_go_into_its_adapter(copied, place):
    before = sorted(copied.rglob("*"))
    with pytest.raises(UserError, match="It would lie inside of"):
        merge_adapter(copied, copied / place, prove=False)
    assert sorted(copied.rglob("*")) == before


def test_a_base_is_not_replaced_but_may_hold_the_run(plain, copied, tmp_path):
    base = shutil.copytree(plain.base.folder, tmp_path / "base")
    with pytest.raises(UserError, match="earlier merge of this lies there"):
        merge_adapter(copied, base, base=str(base), prove=False)
    merge_adapter(copied, base / "run" / "merged", base=str(base), prove=False)
    assert identify_base("base", base).fingerprint == plain.base.fingerprint


def test_a_disk_without_room_is_noticed_before_anything_is_written(plain, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB are free there"):
        merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_one_stands_in_takes_the_merged_model(plain, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge_adapter(plain.adapter, Path("."), prove=False)
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
