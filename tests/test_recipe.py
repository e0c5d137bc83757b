"""Recipes: every fault named with place, value, rule and fix; what is right comes through unchanged."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft.builtin import locate_model
from lora_ft.errors import UserError
from lora_ft.model.machine import Machine
from lora_ft.model.memory import Hardware
from lora_ft.model.planning import describe_work, plan_memory, profile_recipe
from lora_ft.recipe import check_buildable, dump_recipe, load_recipe
from lora_ft.recipe_rules import EXTENT, OWNED_ELSEWHERE
from lora_ft.settle import settle_recipe
from lora_ft.training.distributed import Launch
from lora_ft.yaml_lines import parse_scalar, read_yaml

GOOD = """\
output_dir: runs/x
model: {base: some/base}
lora: {r: 8, target_modules: all-linear}
data:
  sources:
    - {path: rows.jsonl}
training:
  learning_rate: 2e-4
"""
WREN = locate_model("builtin:wren")
BAD_TAGS = ["bool maybe", "int ''", "float ''", "timestamp foo"]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_good_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.training["learning_rate"] == 0.0002
    assert recipe.model.base == "some/base"
    assert recipe.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.output_dir == Path.cwd() / "runs/x"


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", ".2e-3", "0.0002", "+2e-4"])
def test_scientific_notation_is_a_number(tmp_path, text):
    assert load_recipe(write(tmp_path, GOOD.replace("2e-4", text))).training["learning_rate"] == pytest.approx(2e-4)


def test_no_is_a_word(tmp_path):
    text = GOOD + "  eval_strategy: no\n  save_strategy: no\n  tf32: false\n"
    training = load_recipe(write(tmp_path, text)).training
    assert training["eval_strategy"] == training["save_strategy"] == "no" and training["tf32"] is False
    assert load_recipe(write(tmp_path, dump_recipe(load_recipe(write(tmp_path, text))))).training == training


def test_override_is_read_like_the_file(tmp_path):
    overrides = ["training.learning_rate=3e-5", "lora.target_modules=[q_proj, v_proj]", "data.sources.0.weight=0.5"]
    recipe = load_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.training["learning_rate"] == 3e-5
    assert recipe.lora["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.data.sources[0].weight == 0.5


def test_override_path_is_relative_to_the_working_folder(tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load_recipe(write(tmp_path, GOOD), ["data.sources.0.path=mine.jsonl"])
    assert recipe.data.sources[0].path == str(here / "mine.jsonl")


def test_files_of_the_evaluation_are_found_beside_the_recipe(tmp_path):
    text = GOOD + "evaluation: {metrics: [f1, mine.py:score], general: old.jsonl}\n"
    evaluation = load_recipe(write(tmp_path, text)).evaluation
    assert evaluation.metrics == ("f1", f"{tmp_path}/mine.py:score")
    assert evaluation.general == str(tmp_path / "old.jsonl")
    assert load_recipe(write(tmp_path, GOOD)).evaluation.general == "builtin:general/text.jsonl"
    assert load_recipe(write(tmp_path, GOOD), ["evaluation.general=null"]).evaluation.general is None


def test_patience_of_early_stopping(tmp_path):
    assert (
        load_recipe(write(tmp_path, GOOD), ["training.early_stopping_patience=2"]).training["early_stopping_patience"]
        == 2
    )
    assert "waited for at least once" in faults_of(tmp_path, GOOD, "training.early_stopping_patience=0")


def test_all_faults_come_at_once(tmp_path):
    text = GOOD.replace("r: 8", "lora_alhpa: 32").replace("2e-4", "fast") + "  lr: 3\nexprot: {}\n"
    message = faults_of(tmp_path, text, "data.split.validation=1.2")
    path = tmp_path / "recipe.yaml"
    assert f"{path}:3  lora.lora_alhpa: 32\n  peft.LoraConfig (" in message
    assert 'Did you mean "lora_alpha"?' in message
    assert f'{path}:8  training.learning_rate: "fast"\n  Expected a number.' in message
    assert f"{path}:9  training.lr: 3\n  trl.SFTConfig (" in message
    assert f'{path}:10  exprot\n  A recipe has no section of that name. Did you mean "export"?' in message
    assert "command line  data.split.validation: 1.2\n  A share lies between 0 and 1. Write 0.1 for a tenth." in message


@pytest.mark.parametrize(
    ("written", "override", "expected"),
    [
        ("num_train_epochs: 3", "max_steps=5", {"max_steps": 5}),
        ("max_steps: 5", "num_train_epochs=3", {"num_train_epochs": 3}),
        ("num_train_epochs: 3", "max_steps=-1", {"num_train_epochs": 3, "max_steps": -1}),
        ("num_train_epochs: 3", "seed=1", {"num_train_epochs": 3}),
        ("max_steps: 5", "max_steps=7", {"max_steps": 7}),
    ],
)
def test_how_long_a_run_is_has_one_way_of_saying_it(tmp_path, written, override, expected):
    training = load_recipe(write(tmp_path, f"{GOOD}  {written}\n"), [f"training.{override}"]).training
    assert {key: value for key, value in training.items() if key in EXTENT} == expected


def test_a_section_that_is_overridden_as_a_whole_forgets_how_long_a_run_was(tmp_path):
    training = load_recipe(write(tmp_path, GOOD), ["training.max_steps=5", "training={num_train_epochs: 2}"]).training
    assert training == {"num_train_epochs": 2}


def test_two_ways_of_saying_how_long_a_run_is_are_one_too_many(tmp_path):
    found = faults_of(tmp_path, f"{GOOD}  num_train_epochs: 3\n  max_steps: 5\n")
    assert "training.num_train_epochs: 3\n  training.max_steps says how long the run is" in found
    assert "this does nothing beside it" in faults_of(
        tmp_path, GOOD, "training.num_train_epochs=3", "training.max_steps=5"
    )


def test_faults_of_metrics_data_and_machine_come_at_once(tmp_path):
    overrides = ["evaluation.metrics=[rogue]", "data.sources.0.format=chart", "training.report_to=wandbb"]
    recipe = load_recipe(write(tmp_path, GOOD), [*overrides, "model.dtype=float16"])
    with pytest.raises(UserError) as caught:
        settle_recipe(recipe, Machine("cpu", "a CPU", 2**34, False, "measured"), Launch("single"))
    places = [fault.place for fault in caught.value.faults]
    assert places == ["data.sources[0].format", "training.report_to", "evaluation.metrics", "model.dtype"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantization.bnb_4bit_compute_dtype=bf16", "Expected one of bfloat16, float16, float32."),
        ("quantization.bnb_4bit_quant_type=nf5", "Expected one of nf4, fp4."),
        ("training.optim=null", "This field has no empty value."),
        ("training.lr_scheduler_type=null", "This field has no empty value."),
        ("export.push_to=no such name!!/x/y", "A repository on the Hub is named ORG/NAME."),
        ("export.push_to=onlyname", "A repository on the Hub is named ORG/NAME."),
    ],
)
def test_values_that_would_be_refused_much_later(tmp_path, override, message):
    found = faults_of(tmp_path, GOOD, "quantization.load_in_4bit=true", override)
    assert f"command line  {override.replace('=', ': ')}\n  {message}" in found


def test_null_is_a_value_where_the_library_has_one(tmp_path):
    overrides = ["training.save_total_limit=null", "training.report_to=null", "lora.target_modules=null"]
    training = load_recipe(write(tmp_path, GOOD), overrides).training
    assert training["save_total_limit"] is None and training["report_to"] is None


def test_whatever_a_library_refuses_with_is_a_fault():
    """`BitsAndBytesConfig(bnb_4bit_compute_dtype="bf16")` raises AttributeError."""
    from transformers import BitsAndBytesConfig

    fields = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}
    with pytest.raises(UserError, match="bf16"):
        check_buildable("quantization", BitsAndBytesConfig, fields, "recipe")
    with pytest.raises(UserError, match="No such file"):  # as of `training.accelerator_config: abc`
        check_buildable("training", open, {"file": "/nowhere/abc"}, "recipe")


def test_checkpointing_has_one_name_here_and_may_have_either_in_a_recipe(tmp_path):
    """transformers 5.23 renamed it; what plans memory and what trains must not read different names."""
    path = write(tmp_path, GOOD)
    new = load_recipe(path, ["training.activation_checkpointing=true", "training.activation_checkpointing_kwargs={}"])
    assert new.training["gradient_checkpointing"] is True
    assert describe_work(new).checkpointing
    assert describe_work(load_recipe(path, ["training.activation_checkpointing=null"])).checkpointing is False
    both = ["training.activation_checkpointing=true", "training.gradient_checkpointing=false"]
    with pytest.raises(UserError, match="gradient_checkpointing, which is there too"):
        load_recipe(path, both)


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, keys in OWNED_ELSEWHERE.items() for key in keys]
)
def test_keys_owned_elsewhere_are_refused(tmp_path, section, key):
    message = faults_of(tmp_path, GOOD, f"{section}.{key}=1")
    assert f"command line  {section}.{key}: 1\n  This is decided by {OWNED_ELSEWHERE[section][key]}." in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.r=0", "A rank is at least 1."),
        ("lora.r=true", "Expected a whole number."),
        ('lora.r="8"', "Expected a whole number."),
        ("lora.lora_dropout=1.5", "A probability lies between 0 and 1."),
        ("lora.bias=some", 'Expected one of "none", "all", "lora_only".'),
        ("training.learning_rate=-1", "A learning rate lies above 0"),
        ("training.loss_type=foo", "Expected one of nll, dft, chunked_nll."),
        ("training.gradient_checkpointing=1", "Expected true or false"),
        ("model.dtype=bf16", 'Expected one of "auto", "bfloat16", "float16", "float32".'),
        ("data.max_length=2", "A row has room for at least 8 tokens."),
        ("data.split={validation: 0.5, test: 0.5}", "All shares together must leave rows for training."),
        ("quantization={load_in_4bit: true, load_in_8bit: true}", "Weights are read in 4 bit or in 8 bit."),
        ("quantization={bnb_4bit_quant_type: nf4}", "Without load_in_4bit or load_in_8bit it does nothing."),
        ("model.adapter=runs/old/adapter", "keeps its own LoRA settings"),
        ("nonsense", "An override is section.key=value."),
        ("data.sources.7.path=x", "No such place, or not a YAML value."),
        ("lora.r=[", "No such place, or not a YAML value."),
        ("data=3", "data is a mapping of keys to values."),
        ("lora=3", "lora is a mapping."),
        ("evaluation.generate=few", "Expected"),
        ("data.task=[sft]", 'Expected one of "sft", "classification", "seq2seq".'),
        ("lora.lora_alpha=0", "At 0 the adapter would do nothing."),
        *((f"lora.{kind}_config={{}}", "This kind of LoRA") for kind in ("kasa", "velora", "monteclora", "arrow")),
        ("training.seed=-1", "A seed is not negative, and has at most 32 bits."),
        (f"training.seed={2**32}", "at most 32 bits"),
        (f"training.data_seed={2**70}", "at most 32 bits"),
        ("training.num_train_epochs=.inf", "the last one ends"),
        ("training.num_train_epochs=.nan", "At least part of an epoch is trained"),
        ("training.max_steps=0", "At least one step is trained."),
        ("training.max_steps=-2", "At least one step is trained."),
        ("training.max_grad_norm=-1", "A norm is not negative."),
        ("training.max_grad_norm=.nan", "A norm is not negative."),
        ("training.logging_steps=-3", "A number of steps is not negative"),
        ("training.eval_steps=-2", "A number of steps is not negative"),
        ("training.save_steps=-1", "A number of steps is not negative"),
        ("training.save_steps=.inf", "and ends"),
        ("training.save_total_limit=-1", "At least one checkpoint is kept."),
        ("training.neftune_noise_alpha=-1", "Noise is not negative"),
        ("training.dataloader_num_workers=-1", "A number of processes is not negative."),
        ("training.dataloader_persistent_workers=true", "there is no worker"),
        ("training.dataloader_prefetch_factor=2", "there is no worker"),
        ("training.log_level=foo", 'Expected one of "detail", "debug"'),
        ("training.log_level_replica=null", "Expected one of"),
        ("training.include_num_input_tokens_seen=foo", 'Expected true or false or one of "all", "non_padding", "no".'),
        ("training.optim=5", "Expected text."),
        ("training.gradient_checkpointing_kwargs=abc", "Expected a mapping or null."),
        ("training.activation_checkpointing_kwargs=abc", "Expected a mapping or null."),
        ("training.parallelism_config={tp_size: 2}", "which a recipe cannot write"),
        ("training.pad_to_multiple_of=8", "padded to the longest of their batch"),
        ("quantization={load_in_8bit: true, bnb_4bit_quant_type: nf4}", "It does nothing beside load_in_8bit."),
        ("quantization={load_in_4bit: true, llm_int8_threshold: 5.0}", "It does nothing beside load_in_4bit."),
        ("quantization={load_in_4bit: true, llm_int8_has_fp16_weight: true}", "It does nothing beside load_in_4bit."),
        *((f"training.seed=!!{tag}", "not a YAML value") for tag in BAD_TAGS),
        ("lora.target_modules=&a [*a]", "not a YAML value"),
    ],
)
def test_refusals(tmp_path, override, expected):
    message = faults_of(tmp_path, GOOD, override)
    assert expected in message and override.partition("=")[0].partition(".")[0] in message


@pytest.mark.parametrize(
    "override",
    [
        "training.max_grad_norm=0",
        "training.max_steps=-1",
        "training.log_level=passive",
        "training.include_num_input_tokens_seen=non_padding",
        "training.include_num_input_tokens_seen=true",
        "training.dataloader_prefetch_factor=null",
        "training={dataloader_num_workers: 1, dataloader_persistent_workers: true, dataloader_prefetch_factor: 2}",
        f"training.seed={2**32 - 1}",
        "training.gradient_checkpointing_kwargs={use_reentrant: false}",
        "quantization={load_in_4bit: true, llm_int8_skip_modules: [lm_head]}",
        "lora.kasa_config=null",
    ],
)
def test_values_at_the_edge_are_let_through(tmp_path, override):
    load_recipe(write(tmp_path, GOOD), [override])


@pytest.mark.parametrize("tag", BAD_TAGS)
def test_values_that_are_not_what_their_tag_says(tmp_path, tag):
    message = faults_of(tmp_path, GOOD + f"  seed: !!{tag}\n")
    assert f"{tmp_path / 'recipe.yaml'}:9  training.seed" in message and "Quote it, or mend it." in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("!!float 3", 3.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, value):
    path = tmp_path / "numbers.yaml"
    path.write_text(f"key: {text}\n")
    for found in (read_yaml(path, "numbers.yaml").values["key"], parse_scalar(text)):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize("revision", ["0o10", "2e4", "010", "1:30", "no", "1_000"])
def test_text_that_looks_like_a_number_survives_the_dump(tmp_path, revision):
    recipe = load_recipe(write(tmp_path, GOOD), [f'model.revision="{revision}"'])
    assert load_recipe(write(tmp_path, dump_recipe(recipe))).model.revision == revision


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.per_device_train_batch_size=99999999999"],
        ["training.per_device_train_batch_size=auto", "training.gradient_accumulation_steps=99999999999"],
    ],
    ids=str,
)
def test_a_step_of_very_many_rows_is_planned_at_once(tmp_path, overrides):
    planned = plan_memory(load_recipe(write(tmp_path, GOOD), overrides), WREN, Hardware("cpu", 2**33))
    assert planned.work.batch_size * planned.work.accumulation == 99999999999
    assert planned.plan.fits or "per_device_train_batch_size=9 " in str(planned.changes[0])


def test_an_adapter_that_peft_cannot_even_plan(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["lora.layer_replication=[[0, 99]]"])
    with pytest.raises(UserError, match=r"^lora\n  No such adapter can be put on this base: index"):
        profile_recipe(recipe, WREN, Hardware("cpu", 2**34))


def test_library_values_that_no_annotation_spells_out_are_let_through(tmp_path):
    overrides = [
        "lora.init_lora_weights=pissa_niter_16",
        "training.lr_scheduler_type=cosine",
        "lora.loraplus_lr_ratio=16",
    ]
    recipe = load_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.lora["init_lora_weights"] == "pissa_niter_16"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "The section output_dir is missing."),
        ("[1, 2]", "A recipe is a mapping of sections."),
        ("output_dir: [\n", "This is not YAML"),
        ("model: {base: a, base: b}\n", "The key stands twice, first in line 1."),
        ("model: !!python/object/apply:os.system ['echo hacked']\n", "This YAML tag is not read."),
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(f"k{i}: &k{i} [{'*b, ' * 40}]\n" for i in range(200)), "at most"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_text_that_is_no_recipe(tmp_path, text, expected):
    assert expected in faults_of(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"output_dir: \xff\xfe")
    with pytest.raises(UserError, match="Byte 12 is not UTF-8"):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_dump_reads_back_as_the_same_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["quantization.load_in_4bit=true"])
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe


def test_checking_imports_nothing_heavy(tmp_path):
    program = (
        f"import sys; from lora_ft.recipe import load_recipe; load_recipe({str(write(tmp_path, GOOD))!r});"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_brings_defaults_of_its_own_which_are_written_down(tmp_path):
    text = GOOD.replace("data:\n", "data:\n  task: seq2seq\n")
    data = load_recipe(write(tmp_path, text)).data
    assert (data.max_length, data.max_target_length, data.truncation) == (512, 128, "context")
    recipe = load_recipe(write(tmp_path, text), ["data.max_length=64"])
    assert (recipe.data.max_length, recipe.data.max_target_length) == (64, 128)
    assert "data.max_length" not in {choice.key for choice in recipe.choices}
    assert "max_target_length: 128  # chosen: the default of seq2seq" in dump_recipe(recipe)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))).data == recipe.data
    assert load_recipe(write(tmp_path, GOOD)).data.max_length == 1024


PATHS = ["model.base={}", "output_dir={}", "data.sources.0.path=rows/{}", "evaluation.general={}"]


@pytest.mark.parametrize("setting", PATHS)
@pytest.mark.parametrize("name", ["x" * 300, "a/" * 600 + "x"])
def test_names_that_no_disk_takes(tmp_path, setting, name):
    message = faults_of(tmp_path, GOOD, setting.format(name))
    assert "at most 255 bytes" in message and len(message) < 300


def test_the_home_of_nobody(tmp_path):
    assert "no home of that user" in faults_of(tmp_path, GOOD, "model.base=~nobody-of-this-name/base")


@pytest.mark.parametrize("escape", ["\\0", "\\ud800"])
def test_characters_that_are_no_text(tmp_path, escape):
    message = faults_of(tmp_path, GOOD.replace("some/base", f'"a{escape}b"'))
    assert "recipe.yaml:2" in message and "no character of a text" in message
    assert message.encode() and "\0" not in message
