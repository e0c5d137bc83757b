"""Settings chosen for a machine: only what the recipe leaves open, each with its reason; impossible ones refused."""

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_ft.errors import UserError
from lora_ft.model.machine import (
    Machine,
    choose_mapped_bytes,
    choose_settings,
    place_untrained,
    probe_machine,
    settle_validation,
)
from lora_ft.sections import DataSection, ModelSection, Recipe, SourceSection

CPU = Machine("cpu", "some CPU", 16 * 2**30, native_bf16=False, bf16_reason="measured 0.4× the speed of float32")
CPU_BF16 = Machine("cpu", "some CPU", 16 * 2**30, native_bf16=True, bf16_reason="measured 3.0× the speed of float32")
AMPERE = Machine("cuda:1", "some GPU", 24 * 2**30, native_bf16=True, bf16_reason="compute capability 8.6")
TURING = Machine("cuda:0", "some GPU", 16 * 2**30, native_bf16=False, bf16_reason="compute capability 7.5")


def make_recipe(split=None, model=None, **training) -> Recipe:
    data = DataSection(sources=(SourceSection("rows.jsonl", split=split),))
    quantization = {"load_in_4bit": True}
    return Recipe(Path("run"), ModelSection("base", **(model or {})), data, quantization, {"r": 8}, training)


@pytest.mark.parametrize(
    ("machine", "dtype", "bf16", "fp16", "checkpointing"),
    [
        (CPU, "float32", False, False, False),
        (CPU_BF16, "bfloat16", True, False, False),
        (AMPERE, "bfloat16", True, False, True),
        (TURING, "float16", False, True, True),
    ],
)
def test_number_format_follows_the_machine(machine, dtype, bf16, fp16, checkpointing):
    recipe = choose_settings(make_recipe(), machine)
    assert recipe.model.dtype == recipe.quantization["bnb_4bit_compute_dtype"] == dtype
    assert (recipe.training["bf16"], recipe.training["fp16"]) == (bf16, fp16)
    assert recipe.training["gradient_checkpointing"] is checkpointing
    assert all(choice.reason for choice in recipe.choices)
    assert {"model.dtype", "training.bf16", "training.optim"} <= {choice.key for choice in recipe.choices}


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({}, ("epoch", None, "epoch", None)),
        ({"save_steps": 2}, ("steps", 2, "steps", 2)),
        ({"eval_steps": 3}, ("epoch", None, "steps", 3)),
        ({"save_steps": 6, "eval_steps": 3}, ("steps", 6, "steps", 3)),
        ({"eval_steps": 3, "early_stopping_patience": 1, "metric_for_best_model": "loss"}, ("steps", 3, "steps", 3)),
        ({"save_steps": 2, "eval_strategy": "no"}, ("steps", 2, "no", 2)),
    ],
    ids=str,
)
def test_steps_that_the_recipe_names_are_not_passed_over(asked, chosen):
    training = choose_settings(make_recipe(**asked), CPU).training
    keys = ("save_strategy", "save_steps", "eval_strategy", "eval_steps")
    assert tuple(training.get(key) for key in keys) == chosen


def test_what_the_recipe_says_stands():
    asked = {"optim": "sgd", "seed": 3, "report_to": "tensorboard", "eval_strategy": "steps", "bf16": False}
    recipe = choose_settings(make_recipe(model={"dtype": "float32"}, **asked), AMPERE)
    assert recipe.model.dtype == "float32"
    assert {key: recipe.training[key] for key in asked} == asked
    assert not {f"training.{key}" for key in asked} & {choice.key for choice in recipe.choices}


@pytest.mark.parametrize(
    ("model", "training", "machine"),
    [
        ({"dtype": "float16"}, {}, CPU),
        ({}, {"fp16": True}, CPU_BF16),
        ({}, {"tf32": True}, CPU),
        ({}, {"fp16": True, "bf16": True}, AMPERE),
        ({"dtype": "float16"}, {"bf16": True}, AMPERE),
        ({"dtype": "bfloat16"}, {"fp16": True}, AMPERE),
        ({}, {"use_cpu": True}, AMPERE),  # as a recipe says that was resolved on a CPU
    ],
)
def test_impossible_settings_are_refused(model, training, machine):
    """Failure mode 25."""
    with pytest.raises(UserError):
        choose_settings(make_recipe(model=model, **training), machine)


def test_validation_that_nobody_asked_for_is_given_up_quietly_and_asked_for_is_refused():
    """Failure mode 21."""
    chosen = choose_settings(make_recipe(), CPU)
    assert chosen.training["eval_strategy"] == "epoch"
    assert settle_validation(chosen, 5) == chosen
    assert settle_validation(chosen, 0).training["eval_strategy"] == "no"
    assert choose_settings(make_recipe(split="train"), CPU).training["eval_strategy"] == "no"
    with pytest.raises(UserError, match="no validation rows"):
        settle_validation(choose_settings(make_recipe(eval_strategy="steps"), CPU), 0)


def test_this_machine_is_probed():
    machine = probe_machine()
    assert machine.memory_bytes > 2**30 and machine.name and machine.bf16_reason


@pytest.mark.parametrize(
    ("device", "num_gpus", "place"),
    [("cpu", 0, {"": "cpu"}), ("cuda:0", 1, {"": "cuda:0"}), ("cuda:0", 2, "sequential")],
)
def test_a_model_that_only_answers_may_lie_on_several_gpus(monkeypatch, device, num_gpus, place):
    monkeypatch.setattr("lora_ft.model.machine.probe_machine", lambda: replace(AMPERE, device=device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert place_untrained() == place


PIECES = """
import resource, sys, torch
from lora_ft.model.machine import map_large_pieces
if sys.argv[1] == "mapped":
    map_large_pieces(2**20)
first = torch.ones(7 << 20)  # glibc puts what is smaller than this on its heap from now on
del first
pieces = [torch.ones(1 << 20) for _ in range(100)]
del pieces[:-1]
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's heap")
def test_mapped_pieces_are_given_back():
    """A hundred pieces of 4 MiB, of which the last is kept: on the heap, all that lie before it are."""
    held = {}
    for way in ("mapped", "heap"):
        done = subprocess.run([sys.executable, "-c", PIECES, way], capture_output=True, text=True, check=True)
        held[way] = int(done.stdout)
    assert held["heap"] - held["mapped"] > 300


def test_smaller_pieces_are_given_back_where_checkpointing_asks_for_it():
    assert choose_mapped_bytes("cpu", torch.float32, True) < choose_mapped_bytes("cpu", torch.float32, False)
    assert choose_mapped_bytes("cpu", torch.bfloat16, True) is None
    assert choose_mapped_bytes("cuda", torch.float32, True) is None
