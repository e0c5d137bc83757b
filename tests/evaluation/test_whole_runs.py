"""Verdicts on real runs that were made to go wrong, and the page that a run leaves."""

import json
import random

import pytest

from lora_ft.errors import UserError
from lora_ft.recipe import load_recipe
from lora_ft.run import run_recipe

COLOURS, COUNTS = ["red", "green", "blue", "light", "battery", "full"], ["one", "two", "three", "user", "times", "many"]


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes rows whose answers can only be learned by heart, of one split, and returns its source."""

    def write(split, count, seed):
        rng, path = random.Random(seed), tmp_path / f"{split}.jsonl"
        rows = []
        for _ in range(count):
            question = " ".join(rng.choices(COLOURS + COUNTS, k=5))
            answer = " ".join(rng.choices(COLOURS, k=4))
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), "split": split}

    return write


def train(path, *overrides):
    result = run_recipe(load_recipe(path, overrides), quiet=True)
    return result.folder, result.manifest["evaluation"]["verdict"]


@pytest.fixture
def overfitting(recipe_file, write_rows):
    """A recipe that learns sixteen rows by heart."""
    counts = {"train": (16, 1), "validation": (40, 2), "test": (40, 3)}
    sources = [write_rows(split, *count_and_seed) for split, count_and_seed in counts.items()]
    training = {"max_steps": -1, "num_train_epochs": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    return recipe_file(
        data={"sources": sources},
        lora={"r": 16, "lora_alpha": 32},
        training={**training, "eval_strategy": "epoch"},
        evaluation={"generate": 4},
    )


def test_a_run_that_learns_by_heart_is_called_overfit(overfitting):
    path = overfitting
    folder, verdict = train(path)
    assert verdict["name"] == "overfit", verdict
    report = json.loads((folder / "report" / "report.json").read_text())
    lowest = min(report["curves"]["validation"], key=lambda point: point["loss"])
    assert f"lowest at step {lowest['step']} " in verdict["findings"][0]["because"]
    assert 0 < lowest["step"] < 60 and report["curves"]["train"][-1]["loss"] < 0.5 * lowest["loss"]
    page = (folder / "report" / "report.html").read_text()
    assert (
        "<h2>Overfit</h2>" in page and '<circle class="turning"' in page and "refresh" not in page.split("<style>")[0]
    )


def test_early_stopping_ends_soon_after_the_turn_and_keeps_the_best_step(overfitting):
    folder, verdict = train(overfitting, "training.early_stopping_patience=2", "training.save_strategy=epoch")
    report = json.loads((folder / "report" / "report.json").read_text())
    points = report["curves"]["validation"]
    lowest = min(points, key=lambda point: point["loss"])
    assert len(points) == points.index(lowest) + 3, "two evaluations without a better one"
    assert verdict["name"] != "overfit" and "chose the step" in verdict["method"]
    with pytest.raises(UserError, match="no validation to stop by"):
        train(overfitting, "training.early_stopping_patience=2", "training.eval_strategy=no", f"output_dir={folder}-2")


def test_a_test_split_out_of_the_training_rows_is_called_a_leak(recipe_file, write_rows, tmp_path):
    source = write_rows("train", 24, 1)
    leaking = {"path": source["path"], "split": "test"}
    _, verdict = train(recipe_file(data={"sources": [source, leaking]}))
    assert verdict["name"] == "leaking split", verdict
    assert "Of 24 held-out rows, 100% stand in training too" in verdict["findings"][0]["because"]


def test_a_run_without_test_rows_has_a_report_all_the_same(recipe_file):
    folder, verdict = train(recipe_file(data={"split": {"validation": 0.1, "test": 0.0}}))
    assert verdict["name"] == "not measured", verdict
    assert (folder / "report" / "report.html").is_file() and (folder / "report" / "loss.png").is_file()


@pytest.mark.parametrize("general", ["/nowhere/general.jsonl", None])
def test_general_text_is_looked_for_before_training(recipe_file, tmp_path, general):
    path = recipe_file(evaluation={"general": general})
    if general:
        with pytest.raises(UserError, match="nowhere"):
            train(path)
        assert not (tmp_path / "run").exists()
    else:
        folder, _ = train(path)
        assert json.loads((folder / "report" / "report.json").read_text())["general"] is None
