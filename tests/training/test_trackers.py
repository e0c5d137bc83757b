"""Trackers: one recipe key, looked for before training."""

import importlib.util
import json

import pytest

from lora_ft.errors import UserError
from lora_ft.recipe import load_recipe
from lora_ft.training.trackers import TRACKERS, check_trackers


def test_names_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_absent_package_and_unknown_name_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    faults = list(check_trackers({"report_to": ["wandb", "tensorbord", "none"]}))
    assert [fault.value for fault in faults] == ["wandb", "tensorbord"]
    assert faults[0].fix == "Run: pip install wandb" and "Known: tensorboard" in faults[1].rule
    assert not list(check_trackers({"report_to": "none"})) and not list(check_trackers({}))


def test_run_is_refused_before_anything_is_written(recipe_file, tmp_path, monkeypatch):
    from lora_ft.run import run_recipe

    monkeypatch.setattr("lora_ft.training.trackers.TRACKERS", {"wandb": ("no_such_package",)})
    with pytest.raises(UserError, match="pip install no-such-package"):
        run_recipe(load_recipe(recipe_file(), ["training.report_to=wandb"]), quiet=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_the_losses(recipe_file, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lora_ft.run import run_recipe

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run_recipe(load_recipe(recipe_file(evaluation={"generate": 0}), ["training.report_to=tensorboard"]), quiet=True)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in logged if "loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(expected, rel=1e-5)
