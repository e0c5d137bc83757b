"""The memory plan against what was measured, and what it says where nothing can be measured here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from lora_ft.errors import UserError
from lora_ft.model.memory import Hardware, Workload, plan_step
from lora_ft.model.planning import (
    OFFLOAD_FILE,
    Step,
    _lower_rank,
    _takes,
    find_changes,
    parse_memory,
    plan_memory,
    refuse_unfit,
)
from lora_ft.model.profile import profile_model
from lora_ft.recipe import load_recipe

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
MEASURED = json.loads((Path(__file__).parent / "memory_measurements.json").read_text())
LLAMA_8B = AutoConfig.for_model(
    "llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
GIB = 2**30
SERIES = {series["dtype"]: series for series in MEASURED["series"]}
SETTINGS = [(dtype, setting) for dtype, series in SERIES.items() for setting in series["measurements"]]


@pytest.fixture(scope="module")
def profiles():
    return {
        (name, dtype): profile_model(AutoConfig.for_model(**shape), dtype, LORA, is_fused=True)
        for name, shape in MEASURED["shapes"].items()
        for dtype in SERIES
    }


@pytest.fixture(scope="module")
def large():
    return profile_model(LLAMA_8B, "bfloat16", LORA)


def cause(plan, name):
    return sum(each.num_bytes for each in plan.causes if each.name == name)


@pytest.mark.parametrize(
    ("dtype", "measured"),
    SETTINGS,
    ids=lambda part: part if isinstance(part, str) else "-".join(map(str, list(part.values())[:5])),
)
def test_the_plan_is_within_a_tenth_of_what_was_measured(profiles, dtype, measured):
    quantization = NF4 if measured["bits"] == 4 else None
    work = Workload(measured["batch_size"], measured["length"], quantization, measured["checkpointing"])
    plan = plan_step(profiles[measured["shape"], dtype], work, Hardware("cpu", SERIES[dtype]["memory_bytes"]))
    growth = plan.peak_bytes - cause(plan, "libraries")
    assert growth == pytest.approx(measured["growth_bytes"], rel=0.1)


def test_parameters_are_counted_right(large):
    """Meta's Llama 3.1 8B has 8,030,261,248 parameters; r=16 on all its linear layers is 41,943,040."""
    assert large.linear_parameters + large.other_parameters == 8_030_261_248
    assert large.trained_parameters == 41_943_040
    assert large.other_parameters == 2 * 128256 * 4096 + 65 * 4096


def test_4_bit_weights_take_what_qlora_says(large):
    """Dettmers et al. 2023: 4.127 bit a weight with double quantisation, 4.5 without."""
    for quantization, bits in ((NF4, 4.127), ({**NF4, "bnb_4bit_use_double_quant": False}, 4.5), (None, 16)):
        plan = plan_step(large, Workload(1, 512, quantization, True), Hardware("cuda", 24 * GIB))
        assert cause(plan, "base, linear layers") == pytest.approx(large.linear_parameters * bits / 8, rel=1e-3)


def test_an_8b_base_trains_in_4_bit_on_one_consumer_gpu(large):
    """torchtune reports 7.4 GiB for QLoRA of an 8B base on an RTX 4090 (2 rows of 512 tokens, rank 8, README)."""
    profile = profile_model(LLAMA_8B, "bfloat16", {**LORA, "r": 8})
    plan = plan_step(profile, Workload(2, 512, NF4, True), Hardware("cuda", 24 * GIB))
    assert plan.fits
    assert plan.peak_bytes == pytest.approx(7.4 * GIB, rel=0.1)


def test_ranks_share_what_zero_shards(large):
    work = Workload(1, 1024, None, True)
    plans = {s: plan_step(large, work, Hardware("cuda", 80 * GIB, 4, s)) for s in ("none", "zero1", "zero2", "zero3")}
    for stage, name in (("zero1", "optimizer"), ("zero2", "gradients"), ("zero3", "base, linear layers")):
        one = cause(plan_step(large, work, Hardware("cuda", 80 * GIB)), name)
        assert cause(plans[stage], name) == pytest.approx(one / 4, rel=1e-6)
    peaks = [plan.peak_bytes for plan in plans.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert cause(plans["zero3"], "layers, gathered") > 0
    assert cause(plans["none"], "gradients") == 2 * cause(plans["zero1"], "gradients")  # DDP's buckets


@pytest.mark.parametrize(
    ("optimizer", "size"), [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2), ("sgd", 0), ("lion_32bit", 4)]
)
def test_optimizers(large, optimizer, size):
    plan = plan_step(large, Workload(1, 512, NF4, True, optimizer=optimizer), Hardware("cuda", 24 * GIB))
    assert cause(plan, "optimizer") == size * large.trained_parameters


def test_dora_mixtures_and_other_architectures_need_no_formula():
    plain = profile_model(AutoConfig.for_model("gemma2", num_hidden_layers=2), "bfloat16", LORA)
    dora = profile_model(AutoConfig.for_model("gemma2", num_hidden_layers=2), "bfloat16", {**LORA, "use_dora": True})
    assert sum(dora.layer_bytes) > sum(plain.layer_bytes)
    mixture = {"num_hidden_layers": 2, "hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", **mixture)
    attention = profile_model(config, "bfloat16", {**LORA, "target_modules": ["q_proj"]})
    assert attention.fixed_bytes == 0
    assert profile_model(config, "bfloat16", LORA).fixed_bytes > 0  # PEFT adds A·B to the weights of every expert


def test_single_changes_that_make_it_fit(large):
    """Sixteen rows of 2,048 tokens without checkpointing are too much for 24 GiB; each of these is enough."""
    step = Step(large, Workload(16, 2048, NF4, False), Hardware("cuda", 24 * GIB))
    assert not step.plan().fits
    changes = find_changes(step, rank=16)
    assert all(change.plan.fits for change in changes)
    (batch,) = [change for change in changes if "training.per_device_train_batch_size" in change.settings]
    smaller, accumulation = batch.settings.values()
    assert smaller * accumulation == 16
    larger = replace(step, work=replace(step.work, batch_size=2 * smaller))
    assert not larger.plan().fits
    assert str(batch).startswith(
        f"training.per_device_train_batch_size={smaller} training.gradient_accumulation_steps="
    )


def test_a_heap_of_changes_where_one_is_not_enough(large):
    step = Step(large, Workload(8, 4096, None, False), Hardware("cuda", 12 * GIB))
    (change,) = find_changes(step, rank=16)
    assert change.plan.fits
    assert {"training.gradient_checkpointing", "quantization.load_in_4bit"} <= set(change.settings)


def test_nothing_helps(large):
    assert find_changes(Step(large, Workload(1, 128, NF4, True), Hardware("cpu", 2 * GIB)), rank=4) == ()


def test_several_devices_are_offered_sharding(large):
    step = Step(large, Workload(1, 512, None, True), Hardware("cuda", 16 * GIB, 4))
    assert any(change.settings.get("--config_file", "").endswith("zero3.yaml") for change in find_changes(step, 16))


@pytest.mark.parametrize(
    ("text", "size"), [("24 GiB", 24 * GIB), ("80GB", 80 * 10**9), ("16g", 16 * 10**9), ("512 MiB", 512 * 2**20)]
)
def test_sizes_by_hand(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["a lot", "1.2.3 GiB", ".", "24", "-3 GiB"])
def test_a_size_that_is_none(text):
    with pytest.raises(UserError, match="24 GiB"):
        parse_memory(text)


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(recipe_file):
    loaded = load_recipe(recipe_file())
    return replace(loaded, training={**loaded.training, "per_device_train_batch_size": 4})


def test_checkpointing_is_chosen_only_where_it_is_needed(recipe, tiny_base):
    roomy = plan_memory(recipe, tiny_base, Hardware("cpu", 16 * GIB))
    assert roomy.recipe.training["gradient_checkpointing"] is False
    assert "of 14.4 GiB without" in roomy.recipe.choices[-1].reason
    peak = roomy.plan.peak_bytes
    tight = plan_memory(recipe, tiny_base, Hardware("cpu", int(peak / 0.9) - 100_000))
    assert tight.recipe.training["gradient_checkpointing"] is True and tight.plan.fits
    given = replace(recipe, training={**recipe.training, "gradient_checkpointing": True})
    kept = plan_memory(given, tiny_base, Hardware("cpu", 16 * GIB)).recipe
    assert kept.training["gradient_checkpointing"] is True and kept.choices == given.choices


def test_auto_takes_the_largest_batch_that_fits_and_keeps_the_rows(recipe, tiny_base):
    training = {**recipe.training, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": 12}
    automatic = replace(recipe, training=training)
    sizes, memory = [], 16 * GIB
    for _ in range(2):
        settled = plan_memory(automatic, tiny_base, Hardware("cpu", memory))
        memory = int((settled.plan.peak_bytes - 1) / 0.9)
        batch, steps = (
            settled.recipe.training[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        assert batch * steps == 12 and settled.plan.fits
        sizes.append(batch)
    assert sizes[0] == 12 > sizes[1]
    assert [choice.key for choice in settled.recipe.choices][-3:] == [
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
        "training.gradient_checkpointing",
    ]


def test_a_step_that_does_not_fit_is_refused_with_the_way_out(recipe, tiny_base):
    with pytest.raises(UserError, match=r"A step takes about .* Most of it: libraries") as error:
        refuse_unfit(plan_memory(recipe, tiny_base, Hardware("cpu", GIB // 4)))
    assert error.value.exit_code == 2
    huge = replace(recipe, training={**recipe.training, "per_device_train_batch_size": 4096})
    with pytest.raises(UserError, match=r"Fits with: .*training.per_device_train_batch_size=\d+"):
        refuse_unfit(plan_memory(huge, tiny_base, Hardware("cpu", GIB)))


def test_what_is_proposed_is_taken(recipe, tiny_base):
    """Each change beside what the recipe says already: 8 bit, a start that wants whole weights, ranks by layer."""
    lora = recipe.lora
    small = Hardware("cuda", 9 * GIB)
    step = Step(profile_model(LLAMA_8B, "bfloat16", LORA), Workload(1, 512, {"load_in_8bit": True}, True), small)
    (change,) = [each for each in find_changes(step, 16) if "quantization.load_in_4bit" in each.settings]
    assert change.settings["quantization.load_in_8bit"] is False
    assert not _takes(replace(recipe, lora={**lora, "init_lora_weights": "pissa"}), {"quantization.load_in_4bit": True})
    assert not _takes(replace(recipe, lora={**lora, "rank_pattern": {"q_proj": 4}}), {"lora.r": 4})
    assert not _takes(replace(recipe, lora=None), {"lora.r": 4})
    assert not _takes(
        replace(recipe, training={**recipe.training, "optim": "paged_adamw_8bit"}), {"--config_file": OFFLOAD_FILE}
    )
    assert _takes(recipe, {"lora.r": 4}) and _takes(recipe, {"--config_file": OFFLOAD_FILE})


def test_a_lower_rank_does_not_shrink_what_is_trained_whole(large):
    whole = profile_model(LLAMA_8B, "bfloat16", {**LORA, "modules_to_save": ["lm_head"]})
    step = Step(whole, Workload(1, 512, NF4, True), Hardware("cuda", 24 * GIB))
    _, lower = next(iter(_lower_rank(step, 16)))
    assert lower.profile.trained_parameters == whole.trained_parameters - large.trained_parameters // 2
    assert whole.rank_parameters == large.trained_parameters


def test_a_quantised_base_is_read_whole_under_zero3(large):
    """transformers shards 4-bit weights only after it has read them."""
    plan = plan_step(large, Workload(1, 128, NF4, True), Hardware("cuda", 24 * GIB, 64, "zero3"))
    assert plan.peak_bytes > large.linear_parameters * 4.1 / 8 + large.other_parameters * 2


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "mpt"])
def test_architectures_without_an_attention_of_ours_are_counted(kind):
    shape = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {
        "gptj": {"rotary_dim": 8},
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    }
    config = AutoConfig.for_model(kind, **shape, **names.get(kind, {}))
    attention = config._attn_implementation
    assert min(profile_model(config, "float32", LORA).layer_bytes) > 0
    assert config._attn_implementation == attention


def test_answers_of_an_encoder_decoder_are_scored_whole():
    config = AutoConfig.for_model("t5", vocab_size=32128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    plan = plan_step(
        profile_model(config, "float32", LORA, task="seq2seq"), Workload(16, 128, None, False), Hardware("cpu", GIB)
    )
    assert cause(plan, "loss") > 3 * 4 * 16 * 128 * 32128
