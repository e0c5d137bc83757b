"""A launch is read as accelerate means it, and refused before any weight is read if it cannot do what a recipe asks."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from lora_ft.errors import UserError
from lora_ft.model.machine import Machine, choose_settings
from lora_ft.sections import DataSection, ModelSection, Recipe
from lora_ft.training.distributed import (
    DeepSpeedSettings,
    FsdpSettings,
    Launch,
    check_launch,
    end_sharding,
    read_launch,
    settle_launch,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"), key=lambda path: path.name)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STORED_BF16 = {**NF4, "bnb_4bit_quant_storage": "bfloat16"}

ZERO2 = Launch("zero2", world_size=2, local_world_size=2, deepspeed=DeepSpeedSettings(2, False, {}))
ZERO3 = Launch("zero3", world_size=2, local_world_size=2, deepspeed=DeepSpeedSettings(3, False, {}))
OFFLOAD = Launch("zero3", world_size=2, local_world_size=2, deepspeed=DeepSpeedSettings(3, True, {}, True))
FSDP2 = Launch("fsdp", world_size=2, local_world_size=2, fsdp=FsdpSettings(2, "FULL_STATE_DICT", False))
FSDP1 = replace(FSDP2, fsdp=FsdpSettings(1, "FULL_STATE_DICT", False))
DDP = Launch("ddp", world_size=2, local_world_size=2)
LAUNCHES = {
    "cpu_ddp": DDP,
    "cpu_zero2": ZERO2,
    "cpu_zero3": ZERO3,
    "ddp": DDP,
    "fsdp2_qlora": FSDP2,
    "multi_node": DDP,
    "single_gpu": Launch("single"),
    "zero2": ZERO2,
    "zero3": ZERO3,
    "zero3_offload": OFFLOAD,
}
GPU = Machine("cuda:0", "a GPU", 80 * 2**30, native_bf16=True, bf16_reason="compute capability 9.0")


def make_recipe(dtype: str = "bfloat16", quantization=NF4, lora=None, **training) -> Recipe:
    """A recipe as `choose_settings` leaves it, as far as a launch asks."""
    return Recipe(
        output_dir=Path("run"),
        model=ModelSection("base", dtype=dtype),
        data=DataSection(sources=()),
        quantization=quantization,
        lora={"r": 8, **(lora or {})},
        training={"optim": "adamw_torch_fused", "gradient_checkpointing": True, **training},
    )


def refuse(launch: Launch, recipe: Recipe) -> list[str]:
    """The places of the faults."""
    with pytest.raises(UserError) as caught:
        check_launch(launch, recipe)
    assert all(fault.rule and fault.fix for fault in caught.value.faults)
    return [fault.place for fault in caught.value.faults]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_accelerates_own_and_says_how_to_launch_it(config):
    loaded = load_config_from_file(str(config))
    assert loaded.mixed_precision in (None, "no"), "the recipe decides"
    comment = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert 2 <= len(comment) <= 4
    assert any(f"accelerate_configs/{config.name}" in line for line in comment)


def test_every_config_has_its_launch():
    assert [path.stem for path in CONFIGS] == sorted(LAUNCHES)


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(LAUNCHES))
def test_launch_is_read_from_what_accelerate_sets(name, tmp_path):
    """The configs for GPUs start here too: the script only writes down its environment."""
    if LAUNCHES[name].deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, pathlib\n"
        "name = f\"rank{os.environ.get('RANK', '0')}.json\"\n"
        "pathlib.Path(__file__).with_name(name).write_text(json.dumps(dict(os.environ)))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    if name == "multi_node":
        command += ["--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    subprocess.run([*command, str(script)], cwd=ROOT, env=environment, capture_output=True, check=True, timeout=120)
    expected = LAUNCHES[name]
    for rank in range(expected.world_size):
        environ = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert read_launch(environ) == replace(expected, rank=rank, local_rank=rank)


def test_torchrun_alone_is_ddp():
    assert read_launch({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}) == replace(DDP, rank=1, local_rank=1)
    assert read_launch({}) == Launch("single")


def test_what_accelerate_leaves_unset_means_what_it_means_there():
    """Its dataclasses' defaults: ZeRO-2; FSDP 1; full checkpoints in FSDP 1, sharded ones in FSDP 2."""
    assert read_launch({"ACCELERATE_USE_DEEPSPEED": "true"}).strategy == "zero2"
    assert read_launch({"ACCELERATE_USE_FSDP": "true"}).fsdp == FsdpSettings(1, "FULL_STATE_DICT", False)
    fsdp2 = read_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}).fsdp
    assert fsdp2 == FsdpSettings(2, "SHARDED_STATE_DICT", False)


def test_deepspeed_file_is_read(tmp_path):
    file = tmp_path / "deepspeed.json"
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    file.write_text(
        json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": "auto"})
    )
    fixed = {"gradient_accumulation_steps": 1, "bf16.enabled": True}  # the first is accelerate's own default
    assert read_launch(environ).deepspeed == DeepSpeedSettings(3, True, fixed)
    file.write_text("{}")
    with pytest.raises(UserError, match="It has no zero_optimization"):
        read_launch(environ)
    for value in (None, "auto", True):
        zero = {"stage": 2, "offload_optimizer": value, "offload_param": value}
        file.write_text(json.dumps({"zero_optimization": zero, "bf16": value}))
        assert read_launch(environ).deepspeed == DeepSpeedSettings(2, False, {"gradient_accumulation_steps": 1})
    for text in (None, "[]", "[1]", "7", "{"):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(UserError, match=r"cannot be read as a JSON object|It has no zero_optimization"):
            read_launch(environ)


def test_deepspeeds_own_optimizer_and_schedule_do_not_replace_the_recipes(tmp_path):
    file = tmp_path / "deepspeed.json"
    blocks = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupLR"}}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **blocks}))
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "WORLD_SIZE": "2"}
    launch = read_launch(environ)
    with pytest.raises(UserError) as caught:
        check_launch(launch, settle_launch(choose_settings(make_recipe(), GPU), launch))
    places = [fault.place for fault in caught.value.faults]
    assert places == ["DeepSpeed config  optimizer", "DeepSpeed config  scheduler"]


@pytest.mark.parametrize("name", sorted(LAUNCHES))
def test_what_works_is_not_refused(name):
    """What ran with two ranks, best model and all; only FSDP wants 4-bit weights of a floating type, and none of 8."""
    launch = LAUNCHES[name]
    widths = [None, STORED_BF16] if launch.fsdp is not None else [None, STORED_BF16, NF4, {"load_in_8bit": True}]
    for quantization in widths:
        recipe = choose_settings(make_recipe(quantization=quantization, load_best_model_at_end=True), GPU)
        check_launch(launch, settle_launch(recipe, launch))


def test_dora_is_refused_only_over_quantised_weights_in_zero3():
    dora = {"use_dora": True}
    assert refuse(ZERO3, make_recipe(lora=dora)) == ["lora.use_dora"]
    assert refuse(ZERO3, make_recipe(quantization={"load_in_8bit": True}, lora=dora)) == ["lora.use_dora"]
    for launch in (DDP, ZERO2):
        check_launch(launch, make_recipe(lora=dora))
    check_launch(FSDP2, make_recipe(quantization=STORED_BF16, lora=dora))
    check_launch(ZERO3, make_recipe(quantization=None, lora=dora, bf16=True))


@pytest.mark.parametrize("launch", [ZERO2, ZERO3, FSDP2], ids=lambda launch: launch.strategy)
def test_adapter_stays_float32_where_parameters_are_sharded(launch):
    """DeepSpeed's bf16 mode casts the adapter as well; what a recipe says itself is left alone."""
    settled = settle_launch(choose_settings(make_recipe(quantization=STORED_BF16), GPU), launch)
    assert settled.training["bf16"] is False
    assert [choice.value for choice in settled.choices if choice.key == "training.bf16"] == [False]
    asked = choose_settings(make_recipe(quantization=STORED_BF16, bf16=True), GPU)
    assert settle_launch(asked, launch) == asked


def test_only_zero3_needs_its_mode_to_build_an_unquantised_base():
    chosen = choose_settings(make_recipe(quantization=None), GPU)
    assert settle_launch(chosen, ZERO3).training["bf16"] is True
    assert settle_launch(chosen, ZERO2).training["bf16"] is False
    assert settle_launch(chosen, DDP) == chosen
    assert refuse(ZERO3, make_recipe(quantization=None, bf16=False)) == ["model.dtype"]
    assert refuse(ZERO3, make_recipe("float32", quantization=None, bf16=True)) == ["model.dtype"]
    check_launch(ZERO3, make_recipe("float32", quantization=None, bf16=False))


@pytest.mark.parametrize("launch", [ZERO2, ZERO3, FSDP2], ids=lambda launch: launch.strategy)
@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_mixed_precision_must_not_cast_packed_weights(launch, storage):
    """float16 read as bfloat16 trains on a garbage base (loss 6.56 for 6.65), float32 loses half the bytes."""
    stored = {**NF4, "bnb_4bit_quant_storage": storage}
    assert refuse(launch, make_recipe(quantization=stored, bf16=True)) == ["quantization.bnb_4bit_quant_storage"]
    check_launch(launch, make_recipe(quantization=stored))
    check_launch(DDP, make_recipe(quantization=stored, bf16=True))


def test_launcher_and_recipe_agree_on_mixed_precision():
    place = ["accelerate config  mixed_precision"]
    assert refuse(replace(DDP, mixed_precision="bf16"), make_recipe(bf16=False)) == place
    assert refuse(replace(DDP, mixed_precision="fp16"), make_recipe(bf16=True)) == place
    assert refuse(replace(ZERO2, mixed_precision="fp8"), make_recipe()) == place
    check_launch(replace(DDP, mixed_precision="bf16"), make_recipe(bf16=True))
    check_launch(DDP, make_recipe(bf16=True))


def test_fsdp_shards_only_what_it_can():
    assert refuse(FSDP2, make_recipe()) == ["quantization.bnb_4bit_quant_storage"]
    assert refuse(FSDP2, make_recipe(quantization={"load_in_8bit": True})) == ["quantization.load_in_8bit"]
    check_launch(FSDP2, make_recipe(quantization=STORED_BF16, bf16=True))
    check_launch(FSDP2, make_recipe(quantization=None))


@pytest.mark.parametrize("quantization", [None, STORED_BF16])
def test_fsdp1_is_refused(quantization):
    """Its flat tensors have neither names nor shapes of an adapter's weights."""
    refused = refuse(FSDP1, make_recipe(quantization=quantization))
    assert refused == ["accelerate config  fsdp_config.fsdp_version"]


def test_fsdp_checkpoints_hold_the_adapter():
    sharded = replace(FSDP2, fsdp=FsdpSettings(2, "SHARDED_STATE_DICT", False))
    place = "accelerate config  fsdp_config.fsdp_state_dict_type"
    assert refuse(sharded, make_recipe(quantization=STORED_BF16)) == [place]


def test_activations_are_computed_again_once():
    twice = replace(FSDP2, fsdp=FsdpSettings(2, "FULL_STATE_DICT", True))
    place = "accelerate config  fsdp_config.fsdp_activation_checkpointing"
    assert refuse(twice, make_recipe(quantization=STORED_BF16)) == [place]
    check_launch(twice, make_recipe(quantization=STORED_BF16, gradient_checkpointing=False))


def test_cpu_launches_that_would_be_something_else():
    on_cpu = make_recipe(quantization=STORED_BF16, use_cpu=True)
    assert refuse(FSDP2, on_cpu) == ["accelerate config  distributed_type"]
    assert refuse(replace(ZERO2, forces_cpu=True), on_cpu) == ["environment  ACCELERATE_USE_CPU"]
    for launch in (DDP, ZERO2, ZERO3):
        check_launch(launch, on_cpu)


def test_ranks_without_a_gpu_would_train_alone(monkeypatch):
    machine = Machine("cpu", "a CPU", 2**34, True, "measured")
    monkeypatch.setattr("lora_ft.training.distributed.probe_machine", lambda: machine)
    assert refuse(DDP, make_recipe(use_cpu=False)) == ["training.use_cpu"]
    check_launch(replace(DDP, world_size=1), make_recipe(use_cpu=False))


def test_ranks_do_not_wait_for_one_that_has_no_batch_left():
    recipe = make_recipe(accelerator_config={"even_batches": False})
    assert refuse(DDP, recipe) == ["training.accelerator_config.even_batches"]
    check_launch(replace(DDP, world_size=1), recipe)


def test_offloaded_optimizer_is_the_one_asked_for():
    assert refuse(OFFLOAD, make_recipe(optim="paged_adamw_8bit")) == ["training.optim"]
    check_launch(OFFLOAD, make_recipe(optim="adamw_torch"))
    check_launch(ZERO3, make_recipe(optim="adagrad"))


@pytest.mark.parametrize(
    ("key", "value", "training"),
    [
        ("gradient_accumulation_steps", 4, {}),
        ("gradient_clipping", 0.5, {"max_grad_norm": 1.0}),
        ("train_micro_batch_size_per_gpu", 2, {"per_device_train_batch_size": 4}),
        ("bf16.enabled", True, {"bf16": False}),
    ],
)
def test_deepspeed_file_and_recipe_agree(key, value, training):
    launch = replace(ZERO2, deepspeed=DeepSpeedSettings(2, False, {key: value}))
    assert refuse(launch, make_recipe(**training)) == [f"DeepSpeed config  {key}"]


def test_settings_transformers_refuses_only_after_the_base_is_read():
    assert refuse(ZERO3, make_recipe(auto_find_batch_size=True)) == ["training.auto_find_batch_size"]
    check_launch(ZERO2, make_recipe(auto_find_batch_size=True))
    best = make_recipe(save_only_model=True, load_best_model_at_end=True)
    assert refuse(ZERO2, best) == ["training.save_only_model"]
    check_launch(DDP, best)


def test_reentrant_checkpointing_under_ddp():
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    place = ["training.gradient_checkpointing_kwargs.use_reentrant"]
    assert refuse(DDP, make_recipe(**reentrant)) == place
    check_launch(DDP, make_recipe(**reentrant, ddp_find_unused_parameters=False))
    check_launch(ZERO3, make_recipe(**reentrant))


def test_all_faults_come_together():
    launch = replace(FSDP2, mixed_precision="fp16", fsdp=FsdpSettings(2, "SHARDED_STATE_DICT", False))
    places = refuse(launch, make_recipe(use_cpu=True))
    assert places == [
        "accelerate config  distributed_type",
        "accelerate config  mixed_precision",
        "accelerate config  fsdp_config.fsdp_state_dict_type",
        "quantization.bnb_4bit_quant_storage",
    ]


def test_models_are_built_whole_again_after_training():
    """Otherwise the first rank waits for the others when it opens the base to verify or to merge."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    end_sharding()
    assert not is_deepspeed_zero3_enabled()
    assert alive.is_zero3()
