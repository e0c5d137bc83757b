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

from lora_ft.errors import Interrupted, RunFailed, UserError
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


def pretend(recipe, report, check_inputs):
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

    def record(recipe, report, check_inputs):
        seen.append((recipe.lora["target_modules"], recipe.lora["r"]))
        return float(len(seen))

    result = sweep(recipe_file(), space_file(space), 6, folder=tmp_path / "out", run_trial=record)
    assert {str(modules) for modules, _ in seen} == {"['q_proj', 'v_proj']", "all-linear"}
    assert all(rank in (2, 4, 6, 8) for _, rank in seen)
    assert result.best.settings == {"lora.target_modules": seen[0][0], "lora.r": seen[0][1]}


def test_steps_between_whole_numbers_may_be_parts_of_one(recipe_file, space_file, tmp_path):
    seen = []

    def record(recipe, report, check_inputs):
        seen.append(recipe.training["num_train_epochs"])
        return float(len(seen))

    space = {"training.num_train_epochs": {"low": 1, "high": 2, "step": 0.5}}
    sweep(recipe_file(), space_file(space), 12, folder=tmp_path / "out", run_trial=record)
    assert set(seen) == {1, 1.5, 2}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("out", None, "checkpoint-3 is saved.", "")])
def test_sweep_goes_on_where_it_was_interrupted(recipe_file, space_file, tmp_path, stop):
    asked, again = [], []

    def interrupted(recipe, report, check_inputs):
        asked.append(loss_of(recipe))
        (recipe.output_dir / "checkpoint-3").mkdir(parents=True)
        if len(asked) == 3:
            raise stop
        return loss_of(recipe)

    def go_on(recipe, report, check_inputs):
        again.append(loss_of(recipe))
        return again[-1]

    out, path, space = tmp_path / "out", recipe_file(), space_file()
    with pytest.raises(type(stop)):
        sweep(path, space, 5, folder=out, run_trial=interrupted)
    result = sweep(path, space, 5, folder=out, run_trial=go_on)
    assert not (out / "trials" / "2").exists()
    assert len(again) == 3, "two had ended"
    assert again[0] == pytest.approx(asked[2]), "the one that was interrupted comes first"
    assert [trial.state for trial in result.trials] == ["complete", "complete", "interrupted", *["complete"] * 3]
    assert sweep(path, space, 5, folder=out, run_trial=pytest.fail).trials == result.trials, "nothing is left to do"


def test_a_trial_that_breaks_does_not_end_the_sweep(recipe_file, space_file, tmp_path):
    refused = UserError("training", None, "A step does not fit.", "")
    outcomes = iter([float("nan"), refused, torch.OutOfMemoryError("no memory left"), 1.0, 0.5])

    def sometimes(recipe, report, check_inputs):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    result = sweep(recipe_file(), space_file(), 5, folder=tmp_path / "what?#{1}", run_trial=sometimes)
    assert [trial.state for trial in result.trials] == [*["failed"] * 3, *["complete"] * 2]
    assert (tmp_path / "what?#{1}" / "sweep.db").is_file()
    assert result.best.loss == 0.5


def test_a_sweep_of_which_every_trial_breaks_has_failed(recipe_file, space_file, tmp_path):
    faults = iter([torch.OutOfMemoryError("no memory left"), RunFailed("step 3", None, "The loss is not finite.", "")])

    def fail(recipe, report, check_inputs):
        raise next(faults)

    with pytest.raises(RunFailed, match=r"None of 2 trials was complete(.|\n)*The loss is not finite"):
        sweep(recipe_file(), space_file(), 2, folder=tmp_path / "out", run_trial=fail)
    states = [trial["state"] for trial in json.loads((tmp_path / "out" / "sweep.json").read_text())["trials"]]
    assert states == ["failed"] * 2


@pytest.mark.parametrize(("now", "changed"), [(("base", "other"), "data"), (("other", "data"), "model.base")])
def test_trials_of_other_rows_or_another_base_are_refused(recipe_file, space_file, tmp_path, now, changed):
    """Nothing is refused while no trial is complete: what was wrong with the data may have been mended."""
    inputs = [("base", "refused"), ("base", "data"), now, ("base", "data")]

    def train(recipe, report, check_inputs):
        base, data = inputs.pop(0)
        check_inputs(base, data)
        if data == "refused":
            raise UserError("data", None, "There is no such file.", "")
        return 1.0

    path, space, out = recipe_file(), space_file(), tmp_path / "out"
    with pytest.raises(UserError, match="no such file"):
        sweep(path, space, 2, folder=out, run_trial=train)
    with pytest.raises(UserError, match=rf"since its trials: {changed}\. .*another --out"):
        sweep(path, space, 2, folder=out, run_trial=train)
    result = sweep(path, space, 2, folder=out, run_trial=train)
    assert [trial.state for trial in result.trials] == ["interrupted", "complete", "interrupted", "complete"]


def test_trial_tells_its_base_and_data_before_it_trains(recipe_file, tmp_path):
    """Packing changes no row; anything else about the data changes what losses are measured on."""
    from lora_ft.sweep.trial import run_trial

    seen = []

    def stop(base, data):
        seen.append((base, data))
        raise UserError("here", None, "Enough.", "")

    path = recipe_file(training={"eval_strategy": "epoch"})
    for packing in ("false", "true"):
        with pytest.raises(UserError, match="Enough"):
            run_trial(load_recipe(path, [f"data.packing={packing}"]), pytest.fail, stop)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("red", "pink"))
    with pytest.raises(UserError, match="Enough"):
        run_trial(load_recipe(path), pytest.fail, stop)
    assert seen[0] == seen[1] and seen[2][0] == seen[0][0] and seen[2][1] != seen[0][1]


def test_a_sweep_is_one_process(recipe_file, space_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="A sweep is one process, and 2 were launched"):
        sweep(recipe_file(), space_file(), 1, folder=tmp_path / "out", run_trial=pretend)
    assert not (tmp_path / "out").exists()


def test_folder_may_have_any_name(recipe_file, space_file, tmp_path):
    folder = tmp_path / "sw😀 ü"
    result = sweep(recipe_file(), space_file(), 1, folder=folder, run_trial=pretend)
    assert result.best and load_recipe(folder / "best.yaml").output_dir == folder / "best"


def test_a_recipe_that_is_refused_ends_the_sweep(recipe_file, space_file, tmp_path):
    def refuse(recipe, report, check_inputs):
        raise UserError("model.base", None, "There is no such base.", "")

    with pytest.raises(UserError, match="no such base"):
        sweep(recipe_file(), space_file(), 4, folder=tmp_path / "out", run_trial=refuse)
    mended = space_file({"lora.r": [2, 4]})
    result = sweep(recipe_file(), mended, 2, ["lora.lora_alpha=2"], folder=tmp_path / "out", run_trial=pretend)
    assert [set(trial.settings) for trial in result.trials] == [{"lora.r"}] * 2


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
        ({"lora.lora_alpha": {"low": 1, "high": 9, "step": 9}}, "at most the way from low to high"),
        ({"lora.r": {"low": 2, "high": 8, "step": 1.5}}, "3.5\n.*whole number"),
        ({"training.learning_rate": {"low": 1e-6, "high": 1e-1, "log": "no"}}, "log is true or false"),
        ({"training.weight_decay": {"low": True, "high": 3}}, "low is a number"),
        ({"training.weight_decay": {"low": 0, "high": float("inf")}}, "high is a number"),
        ({"training.weight_decay": {"low": 0, "high": 3, "step": True}}, "step is a number"),
        ({"model": [{"base": "a"}, {"base": "b"}]}, "model.base is part of it"),
        ({"evaluation.generate": [1, 2]}, "never sees"),
        ({"export.merge": [True, False]}, "leaves no adapter"),
        ({"guards.stall_minutes": [1, 2]}, "changes no loss"),
        ({"training.early_stopping_patience": [1, 2]}, "whatever the patience"),
        ({"training.load_best_model_at_end": [True, False]}, "against the last of another"),
        ({"training.save_steps": [1, 2]}, "saves nothing"),
        ({"training.logging_steps": [1, 2]}, "changes no loss"),
        ({}, "at least one key"),
    ],
)
def test_space_that_does_not_fit_is_refused(recipe_file, space_file, space, message):
    with pytest.raises(UserError, match=message) as caught:
        load_space(space_file(space), recipe_file())
    assert all("space.yaml" in fault.place for fault in caught.value.faults)


def test_what_changes_a_trial_can_be_varied(recipe_file, space_file):
    """Among it what stands beside keys that cannot be, and steps that fill the way but for rounding."""
    space = {
        "data.packing": [True, False],
        "guards.skip_non_finite": [0, 1],
        "lora": [{"r": 2, "target_modules": "all-linear"}, {"r": 4, "target_modules": ["q_proj"]}],
        "training.weight_decay": {"low": 0.1, "high": 0.3, "step": 0.2},
    }
    assert [axis.key for axis in load_space(space_file(space), recipe_file())] == list(space)


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


def test_signal_ends_the_sweep_and_leaves_no_weights(recipe_file, space_file, tmp_path):
    path = recipe_file(training={"max_steps": 5000, "eval_strategy": "steps", "eval_steps": 1000})
    command = [sys.executable, "-m", "lora_ft", "sweep", str(path), "--space", str(space_file()), "--trials", "3"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "out" / "trials" / "0" / "log.jsonl", time.monotonic() + 200
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "The same command begins it again" in said, said
    assert not list((tmp_path / "out" / "trials").iterdir())


def test_trial_without_validation_rows_is_refused(recipe_file, tmp_path):
    from lora_ft.sweep.trial import run_trial

    path = recipe_file(training={"eval_strategy": "no"})
    with pytest.raises(UserError, match="steers by validation rows"):
        run_trial(load_recipe(path, [f"output_dir={tmp_path / 'trial'}"]), pytest.fail, lambda base, data: None)


def test_trial_that_ends_before_its_first_evaluation_is_refused(recipe_file, tmp_path):
    from lora_ft.sweep.trial import run_trial

    path = recipe_file(training={"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1000})
    with pytest.raises(UserError, match=r"training\.eval_steps(.|\n)*No evaluation happened"):
        run_trial(load_recipe(path, [f"output_dir={tmp_path / 'trial'}"]), pytest.fail, lambda base, data: None)
