"""A sweep: steered by validation alone, ended early, gone on with, and refused before anything is trained."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from lora_ft.errors import UserError
from lora_ft.recipe import load_recipe
from lora_ft.sweep.space import load_space
from lora_ft.sweep.study import sweep

pytest.importorskip("optuna")

SPACE = {"lora.r": [2, 4, 8], "training.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}


@pytest.fixture
def space_file(tmp_path):
    """A function that writes a space and returns its path."""

    def write(space=None):
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(SPACE if space is None else space))
        return path

    return write


def loss_of(recipe):
    """Lowest at rank 8 and a learning rate of 1e-3, as if it had been trained."""
    import math

    return abs(math.log10(recipe.training["learning_rate"]) + 3) + (8 - recipe.lora["r"]) / 8


def pretend(recipe, report):
    """A trial that reports three validation losses on the way to its own."""
    for number in (1, 2, 3):
        if report(number, loss_of(recipe) + 3 - number):
            return None
    return loss_of(recipe)


def test_best_recipe_is_written_and_trains_as_it_stands(recipe_file, space_file, tmp_path):
    result = sweep(recipe_file(), space_file(), 12, folder=tmp_path / "out", run_trial=pretend)
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(result.trials) == 12 and result.best.loss == min(trial.loss for trial in complete)
    assert any(trial.state == "pruned" for trial in result.trials), "trials behind the median end early"
    chosen = load_recipe(tmp_path / "out" / "best.yaml")
    assert chosen.lora["r"] == result.best.settings["lora.r"]
    assert chosen.training["learning_rate"] == result.best.settings["training.learning_rate"]
    assert loss_of(chosen) == pytest.approx(result.best.loss)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["best"]["number"] == result.best.number
    for name in ("history.png", "slices.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_lists_and_whole_numbers(recipe_file, space_file, tmp_path):
    space = {"lora.target_modules": [["q_proj", "v_proj"], "all-linear"], "lora.r": {"low": 2, "high": 8, "step": 2}}
    seen = []

    def record(recipe, report):
        seen.append((recipe.lora["target_modules"], recipe.lora["r"]))
        return float(len(seen))

    result = sweep(recipe_file(), space_file(space), 6, folder=tmp_path / "out", run_trial=record)
    assert {str(modules) for modules, _ in seen} == {"['q_proj', 'v_proj']", "all-linear"}
    assert all(rank in (2, 4, 6, 8) for _, rank in seen)
    assert result.best.settings == {"lora.target_modules": seen[0][0], "lora.r": seen[0][1]}


def test_sweep_goes_on_where_it_was_interrupted(recipe_file, space_file, tmp_path):
    asked = []

    def interrupted(recipe, report):
        asked.append(loss_of(recipe))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return loss_of(recipe)

    out, path, space = tmp_path / "out", recipe_file(), space_file()
    with pytest.raises(KeyboardInterrupt):
        sweep(path, space, 5, folder=out, run_trial=interrupted)
    again = []
    result = sweep(
        path, space, 5, folder=out, run_trial=lambda recipe, report: again.append(loss_of(recipe)) or again[-1]
    )
    assert len(again) == 3, "two had ended"
    assert again[0] == pytest.approx(asked[2]), "the one that was interrupted comes first"
    assert [trial.state for trial in result.trials] == ["complete", "complete", "interrupted", *["complete"] * 3]
    assert sweep(path, space, 5, folder=out, run_trial=pytest.fail).trials == result.trials, "nothing is left to do"


def test_a_trial_that_breaks_does_not_end_the_sweep(recipe_file, space_file, tmp_path):
    refused = UserError("training", None, "A step does not fit.", "")
    outcomes = iter([1.0, float("nan"), refused, torch.OutOfMemoryError("no memory left"), 0.5])

    def sometimes(recipe, report):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    result = sweep(recipe_file(), space_file(), 5, folder=tmp_path / "what?#{1}", run_trial=sometimes)
    assert [trial.state for trial in result.trials] == ["complete", *["failed"] * 3, "complete"]
    assert (tmp_path / "what?#{1}" / "sweep.db").is_file()
    assert result.best.loss == 0.5


def test_a_recipe_that_is_refused_ends_the_sweep(recipe_file, space_file, tmp_path):
    def refuse(recipe, report):
        raise UserError("model.base", None, "There is no such base.", "")

    with pytest.raises(UserError, match="no such base"):
        sweep(recipe_file(), space_file(), 4, folder=tmp_path / "out", run_trial=refuse)


def test_another_sweep_in_the_folder_is_refused(recipe_file, space_file, tmp_path):
    sweep(recipe_file(), space_file(), 1, folder=tmp_path / "out", run_trial=pretend)
    with pytest.raises(UserError, match="another recipe or another space"):
        sweep(recipe_file(), space_file(), 2, ["lora.lora_alpha=2"], folder=tmp_path / "out", run_trial=pretend)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lora.rr": [1, 2]}, "no field of that name"),
        ({"lora.r": [4, 0]}, "A rank is at least 1"),
        ({"training.learning_rate": {"low": 1e-3, "high": 1e-5}}, "low lies below high"),
        ({"training.learning_rate": {"low": 0, "high": 1, "log": True}}, "above 0"),
        ({"training.learning_rate": 1e-3}, "a list of values, or bounds"),
        ({"training.learning_rate": {"low": 1, "hihg": 2}}, "a list of values, or bounds"),
        ({"lora.r": []}, "nothing to choose"),
        ({"data.split.seed": [1, 2]}, "different validation rows"),
        ({"data.max_length": [64, 128]}, "different tokens of them"),
        ({"model.base": ["a", "b"]}, "different vocabularies"),
        ({"lora.lora_alpha": {"low": 1, "high": 9, "step": 0}}, "A step is a number above 0"),
        ({}, "at least one key"),
    ],
)
def test_space_that_does_not_fit_is_refused(recipe_file, space_file, space, message):
    with pytest.raises(UserError, match=message) as caught:
        load_space(space_file(space), recipe_file())
    assert all("space.yaml" in fault.place for fault in caught.value.faults)


def test_absent_package_is_refused_with_the_command_that_installs_it(recipe_file, space_file, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lora-ft\[sweep\]'"):
        sweep(recipe_file(), space_file(), 1)


def test_trials_train_and_a_killed_sweep_goes_on(recipe_file, space_file, tmp_path):
    """Three trials of three steps on the tiny base, with the process killed in the middle of the second."""
    path = recipe_file(training={"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1})
    command = [sys.executable, "-m", "lora_ft", "sweep", str(path), "--space", str(space_file()), "--trials", "3"]
    command += ["--out", str(tmp_path / "out"), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    log, deadline = tmp_path / "out" / "trials" / "1" / "log.jsonl", time.monotonic() + 200
    while not log.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert log.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sum(trial["state"] in ("complete", "pruned") for trial in result["trials"]) == 3
    assert result["best"]["loss"] > 0
    assert not list((tmp_path / "out").rglob("*.safetensors")), "trials leave no weights"
    load_recipe(result["best_recipe"])


def test_trial_without_validation_rows_is_refused(recipe_file, tmp_path):
    from lora_ft.sweep.trial import run_trial

    path = recipe_file(training={"eval_strategy": "no"})
    with pytest.raises(UserError, match="steers by validation rows"):
        run_trial(load_recipe(path, [f"output_dir={tmp_path / 'trial'}"]), lambda number, loss: False)
