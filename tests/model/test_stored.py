"""What a base's own files settle in a recipe, and what they rule out before a weight is read."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lora_ft.errors import UserError
from lora_ft.model.load import find_base, load_base
from lora_ft.model.machine import Machine, choose_settings
from lora_ft.model.memory import Hardware, Workload, plan_step
from lora_ft.model.planning import plan_memory
from lora_ft.model.profile import profile_model
from lora_ft.model.stored import check_export, describe_reach, settle_quantization
from lora_ft.recipe import load_recipe
from lora_ft.sections import ModelSection
from tests.conftest import make_tokenizer

CPU = Machine("cpu", "some CPU", 16 * 2**30, native_bf16=False, bf16_reason="measured")
HARDWARE = Hardware("cpu", 16 * 2**30)
SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA2 = ("gemma2", {**SMALL, **HEADS, "head_dim": 16})
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def save_config(folder: Path, model_type: str, settings: dict) -> Path:
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return folder


def plan(recipe_file, base: Path, **sections):
    model = {"base": str(base), **sections.pop("model", {})}
    return plan_memory(choose_settings(load_recipe(recipe_file(model=model, **sections)), CPU), base, HARDWARE)


# --- attention -----------------------------------------------------------------------------------------------------


def test_attention_that_was_chosen_is_one_the_architecture_has(recipe_file, tmp_path):
    recipe = plan(recipe_file, save_config(tmp_path / "gemma2", *GEMMA2)).recipe
    assert recipe.model.attn_implementation == "eager"
    (choice,) = [each for each in recipe.choices if each.key == "model.attn_implementation"]
    assert (choice.value, choice.reason) == ("eager", "the architecture has no sdpa")


def test_attention_that_was_asked_for_is_refused_with_the_one_there_is(recipe_file, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    base = tmp_path / "gemma2"
    Gemma2ForCausalLM(Gemma2Config(**GEMMA2[1])).save_pretrained(base)
    with pytest.raises(UserError, match=r"Write model\.attn_implementation: eager"):
        plan(recipe_file, base, model={"attn_implementation": "sdpa"})
    with pytest.raises(UserError, match=r"Write model\.attn_implementation: eager"):
        load_base(find_base(str(base)), ModelSection(str(base), dtype="float32", attn_implementation="sdpa"))


def test_eager_attention_keeps_its_probabilities():
    profile = profile_model(AutoConfig.for_model(*GEMMA2[:1], **GEMMA2[1]), "float32", {"target_modules": ["q_proj"]})
    fused, eager = (
        plan_step(profile, Workload(2, 512, None, False, attention=name), HARDWARE).peak_bytes
        for name in ("sdpa", "eager")
    )
    probabilities = 4 * 2 * 512 * 512 * 4 * 2  # bytes, rows, queries, keys, heads, layers
    assert eager - fused > probabilities


# --- architectures -------------------------------------------------------------------------------------------------

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def coded_base(tiny_base, tmp_path):
    """The tiny base as an architecture that transformers does not have."""
    folder = tmp_path / "coded"
    shutil.copytree(tiny_base, folder)
    (folder / "modeling_mine.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": classes}))
    return folder


def test_code_beside_a_base_runs_only_where_it_may(coded_base, recipe_file, lora_ft, tmp_path):
    with pytest.raises(UserError, match=r"model\.trust_remote_code: true"):
        find_base(str(coded_base))
    path = recipe_file(model={"base": str(coded_base), "trust_remote_code": True}, export={"merge": True})
    done = lora_ft("train", path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    refused = lora_ft("verify", tmp_path / "run")
    assert refused.returncode == 1 and "--trust-remote-code" in refused.stdout
    done = lora_ft("verify", tmp_path / "run", "--trust-remote-code")
    assert done.returncode == 0, done.stdout


def test_code_beside_a_base_is_not_needed_where_transformers_has_its_architecture(coded_base):
    config = json.loads((coded_base / "config.json").read_text())
    (coded_base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    find_base(str(coded_base))


ENCODER = {**SMALL, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_type", "settings", "modules"),
    [
        ("bert", ENCODER, ["query", "value"]),
        ("roberta", ENCODER, ["query", "value"]),
        ("distilbert", {"vocab_size": 320, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, ["q_lin"]),
        ("llama", {**SMALL, **HEADS}, "all-linear"),
    ],
)
def test_classifiers_of_every_kind_are_planned(recipe_file, tmp_path, model_type, settings, modules):
    base = save_config(tmp_path / model_type, model_type, settings)
    sections = {"data": {"task": "classification"}, "evaluation": None, "lora": {"target_modules": modules}}
    planned = plan(recipe_file, base, **sections)
    assert planned.plan.fits and planned.plan.peak_bytes > 0


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_rows_longer_than_the_positions_a_base_learned_are_refused(recipe_file, tmp_path, model_type):
    settings = {"vocab_size": 320, "max_position_embeddings": 40, "num_hidden_layers": 2, "hidden_size": 64}
    base = save_config(tmp_path / model_type, model_type, {**settings, "num_attention_heads": 4, "ffn_dim": 64})
    recipe = choose_settings(load_recipe(recipe_file(model={"base": str(base)})), CPU)
    plan_memory(recipe, base, HARDWARE, longest=40)
    with pytest.raises(UserError, match="learned 40 positions"):
        plan_memory(recipe, base, HARDWARE, longest=41)


@pytest.mark.parametrize(
    ("model_type", "settings", "rule"),
    [
        ("vit", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}, "has no AutoModelForCausalLM"),
        ("t5", {"d_model": 64}, "has no AutoModelForCausalLM"),
        ("nonesuch", {}, "nonesuch"),
    ],
)
def test_a_base_of_no_use_for_the_task_is_one_sentence(recipe_file, tmp_path, model_type, settings, rule):
    base = tmp_path / model_type
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))
    with pytest.raises(UserError, match=rule):
        plan(recipe_file, base)


# --- weights that are stored quantised -----------------------------------------------------------------------------


@pytest.fixture
def store(tiny_base, tmp_path):
    """A function that says how the tiny base is stored, in its config alone, and returns its folder."""

    def write(**stored) -> Path:
        folder = tmp_path / "stored"
        shutil.copytree(tiny_base, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
        return folder

    return write


def test_a_section_that_a_stored_base_contradicts_is_refused(recipe_file, store):
    base = store(quant_method="bitsandbytes", **{**NF4, "bnb_4bit_quant_type": "fp4"})
    asked = {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}
    with pytest.raises(UserError) as caught:
        plan(recipe_file, base, quantization=asked)
    places = {fault.place for fault in caught.value.faults}
    assert places == {"quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_compute_dtype"}
    assert "with fp4. Remove the section quantization" in str(caught.value)


@pytest.mark.parametrize("skipped", [None, ["visual"], ["visual", "lm_head"]])
def test_layers_that_a_stored_base_left_alone_may_be_named_again_or_not(recipe_file, store, skipped):
    base = store(quant_method="bitsandbytes", **NF4, llm_int8_skip_modules=["lm_head", "visual"])
    plan(recipe_file, base, quantization={**NF4, "llm_int8_skip_modules": skipped})


def test_a_section_for_a_base_stored_by_another_library_is_refused(recipe_file, store):
    with pytest.raises(UserError, match="stored quantised by gptq"):
        plan(recipe_file, store(quant_method="gptq", bits=4, group_size=128), quantization=NF4)


def test_what_was_chosen_follows_what_is_stored(recipe_file, store):
    base = store(quant_method="bitsandbytes", **NF4, bnb_4bit_compute_dtype="bfloat16")
    path = recipe_file(model={"base": str(base)}, quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    recipe = settle_quantization(choose_settings(load_recipe(path), CPU), base)
    assert recipe.quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    (choice,) = [each for each in recipe.choices if each.key == "quantization.bnb_4bit_compute_dtype"]
    assert (choice.value, choice.reason) == ("bfloat16", "as the base is stored")


@pytest.mark.parametrize(
    ("stored", "note"),
    [
        ({**NF4, "quant_method": "bitsandbytes"}, "× 4.13 bit"),
        ({"load_in_8bit": True}, "× 8.00 bit"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "× 4.12 bit"),
        ({"quant_method": "hqq"}, "× 32.00 bit, at most: the plan does not know the size of hqq weights"),
    ],
)
def test_the_plan_counts_weights_as_they_are_stored(recipe_file, store, stored, note):
    planned = plan(recipe_file, store(**stored))
    (linear,) = [cause for cause in planned.plan.causes if cause.name == "base, linear layers"]
    assert linear.note.endswith(note)


def test_a_stored_base_is_read_as_it_is_or_not_at_all(tiny_base, tmp_path):
    section = ModelSection(str(tiny_base), dtype="float32", attn_implementation="sdpa")
    packed = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=BitsAndBytesConfig(**NF4))
    packed.save_pretrained(tmp_path / "stored")
    base = find_base(str(tmp_path / "stored"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "You passed `quantization_config`")
        again = load_base(base, section, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert again.model.layers[0].mlp.up_proj.weight.quant_type == "nf4"
    with pytest.raises(UserError, match=r"quantization\.bnb_4bit_quant_type: fp4"):
        load_base(base, section, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})


# --- export and tokens ---------------------------------------------------------------------------------------------


def test_what_cannot_be_made_of_the_adapter_is_said_before_training_all_at_once(recipe_file, store, lora_ft, tmp_path):
    wanted = {"merge": True, "push_to": "me/mine"}
    base = store(quant_method="bitsandbytes", **NF4)
    done = lora_ft("check", recipe_file(model={"base": str(base)}, export=wanted))
    assert done.returncode == 2
    run = tmp_path / "run"
    assert f"lora-ft merge {run / 'adapter'} --onto quantized --out {run / 'merged'}" in done.stderr
    assert f"lora-ft push {run} me/mine --base-id ORG/NAME" in done.stderr


def test_export_of_a_plain_base_is_possible(recipe_file, tiny_base):
    assert not list(check_export(load_recipe(recipe_file(export={"merge": True})), tiny_base))


@pytest.mark.parametrize("content", ["extra1", "the battery"])
def test_tokens_that_the_base_has_no_row_for(recipe_file, tiny_base, tmp_path, lora_ft, content):
    """A tokenizer may know more tokens than the base, as long as no row has them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra0", "extra1"])
    tokenizer.save_pretrained(base)
    path = recipe_file(model={"base": str(base)}, evaluation={"general": None})
    data = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] += f" {content}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lora_ft("check", path)
    if content == "extra1":
        assert done.returncode == 2
        assert 'have token 321 ("extra1"), and the base knows 320 tokens' in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model_type", "longest", "is_told"),
    [("gemma2", 64, False), ("gemma2", 65, True), ("t5", 9999, False)],
)
def test_rows_longer_than_the_base_was_made_for_are_told(recipe_file, tmp_path, model_type, longest, is_told):
    settings = {**GEMMA2[1], "max_position_embeddings": 64} if model_type == "gemma2" else {}
    base = save_config(tmp_path / "base", model_type, settings)
    task = "sft" if model_type == "gemma2" else "seq2seq"
    recipe = load_recipe(recipe_file(model={"base": str(base)}, data={"task": task}))
    said = describe_reach(recipe, base, longest)
    assert (said is not None) == is_told
    assert not is_told or f"has 65 tokens, and {base} was made for 64;" in said
