"""A run's folder belongs to one run; nothing is written before that is sure."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft.errors import UserError
from lora_ft.recipe import load_recipe
from lora_ft.training.checkpoint import draft_checkpoint, rotate_checkpoints, seal_checkpoint
from lora_ft.training.identity import identify_run, refuse_disunity
from lora_ft.training.lock import run_lock
from lora_ft.training.run_folder import (
    check_run_folder,
    check_space,
    claim_run_folder,
    read_manifest,
    remove_run,
    write_manifest,
)


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file())


def open_folder(recipe, base="base", data="data", **ways):
    return check_run_folder(recipe, base, data, **ways)


def begin(recipe, **ways):
    """A run that was claimed, and let go of after its first step, before it was finished."""
    run = open_folder(recipe, **ways)
    with claim_run_folder(run, recipe, {}):
        (recipe.output_dir / "log.jsonl").write_text('{"step": 1}\n')
    return run


def save_checkpoint(recipe, step, weights_only=False, value=1.0):
    """A checkpoint with an adapter of one tensor."""
    draft = draft_checkpoint(recipe.output_dir, step)
    save_file({"lora_A": torch.full((2,), value)}, draft / "adapter_model.safetensors")
    (draft / "adapter_config.json").write_text("{}")
    return seal_checkpoint(draft, weights_only=weights_only)


def test_new_folder_is_not_touched_by_the_check(recipe):
    run = open_folder(recipe)
    assert run.resume_from is None and not recipe.output_dir.exists()


def test_unfinished_run_goes_on_from_its_newest_whole_checkpoint(recipe):
    begin(recipe)
    assert open_folder(recipe).resume_from is None
    for step in (5, 10):
        save_checkpoint(recipe, step)
    (recipe.output_dir / "checkpoint-15").mkdir()
    draft_checkpoint(recipe.output_dir, 20)
    assert open_folder(recipe).resume_from == recipe.output_dir / "checkpoint-10"
    begin(recipe)
    assert not (recipe.output_dir / ".saving").exists(), "what a killed process left is cleared away"


def test_a_damaged_checkpoint_takes_no_place_from_what_is_saved_after_it(recipe):
    """Left where it is, it would be the newest, and the next one that is saved the first to go."""
    begin(recipe)
    for step in (4, 8, 12):
        save_checkpoint(recipe, step)
    (recipe.output_dir / "checkpoint-12" / "adapter_model.safetensors").write_bytes(b"")
    assert begin(recipe).resume_from == recipe.output_dir / "checkpoint-8"
    saved = save_checkpoint(recipe, 10)
    rotate_checkpoints(recipe.output_dir, 2, saved, best_steps=[8])
    assert saved.is_dir() and {path.name for path in recipe.output_dir.glob("checkpoint-*")} == {
        "checkpoint-8",
        "checkpoint-10",
    }


def test_another_attention_is_another_run(recipe, recipe_file):
    begin(recipe)
    other = load_recipe(recipe_file(), ["model.attn_implementation=eager"])
    with pytest.raises(UserError, match="attn_implementation"):
        open_folder(other)


def test_finished_run_is_refused_unless_fresh(recipe):
    run = begin(recipe)
    (recipe.output_dir / "adapter").mkdir()
    (recipe.output_dir / "mine.txt").write_text("keep")
    manifest = write_manifest(run, "finished", {})
    assert set(manifest["files"]) == {"recipe.yaml", "log.jsonl", "mine.txt"}
    with pytest.raises(UserError, match="holds this very run, finished"):
        open_folder(recipe)
    begin(recipe, fresh=True)
    assert not (recipe.output_dir / "adapter").exists()
    assert (recipe.output_dir / "mine.txt").read_text() == "keep", "only what runs write is removed"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate: 0.001\n  The run in "),
        ({"lora": {"r": 8}}, "lora.r: 8\n  The run in "),
        ({"quantization": {"load_in_4bit": True}}, "made with another quantization"),
        ({"model": {"dtype": "bfloat16"}}, "made with another dtype"),
    ],
)
def test_another_run_is_refused_with_the_difference(recipe, recipe_file, section, expected):
    begin(recipe)
    with pytest.raises(UserError) as caught:
        open_folder(load_recipe(recipe_file(**section)))
    assert expected in str(caught.value)


@pytest.mark.parametrize("other", [{"base": "another"}, {"data": "another"}])
def test_another_base_or_data_is_refused(recipe, other):
    begin(recipe)
    with pytest.raises(UserError, match=f"made with another {next(iter(other))}"):
        open_folder(recipe, **other)


def test_harmless_settings_may_change(recipe, recipe_file):
    begin(recipe)
    changed = {"logging_steps": 7, "save_total_limit": 1, "max_steps": 9}
    run = open_folder(load_recipe(recipe_file(training=changed, guards={"skip_non_finite": 2})))
    assert run.notes == (
        "training.max_steps: 3 → 9",
        "guards.skip_non_finite: 0 → 2",
        "training.logging_steps: 1 → 7",
        "training.save_total_limit: None → 1",
    )


def test_run_cannot_become_shorter(recipe, recipe_file):
    begin(recipe)
    with pytest.raises(UserError, match=r"training\.max_steps: 2\n.* has 3, and can only become longer"):
        open_folder(load_recipe(recipe_file(training={"max_steps": 2})))


def test_other_number_of_ranks_is_refused(recipe):
    begin(recipe)
    with pytest.raises(UserError, match=r"launch\.processes: 2"):
        open_folder(recipe, processes=2)


def test_both_ways_on_are_named(recipe, recipe_file):
    begin(recipe)
    with pytest.raises(UserError) as caught:
        open_folder(load_recipe(recipe_file(training={"learning_rate": 1e-3})))
    assert "--fresh" in str(caught.value) and "--warm-start" in str(caught.value)


def test_warm_start_takes_the_newest_weights_and_nothing_else(recipe, recipe_file):
    begin(recipe)
    save_checkpoint(recipe, 5)
    save_checkpoint(recipe, 10, value=2.0)
    other = load_recipe(recipe_file(training={"learning_rate": 1e-3}))
    run = begin(other, warm=True)
    assert run.resume_from is None and run.warm_start.name == "checkpoint-10"
    kept = recipe.output_dir / "warm_start"
    assert load_file(kept / "adapter_model.safetensors")["lora_A"].tolist() == [2.0, 2.0]
    assert not list(recipe.output_dir.glob("checkpoint-*"))
    assert open_folder(other).warm_start == kept, "the run that was begun goes on from the same weights"
    (kept / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        open_folder(other)


def test_warm_start_without_weights(recipe):
    with pytest.raises(UserError, match="none lie there"):
        open_folder(recipe, warm=True)


def test_checkpoint_of_weights_alone_is_refused(recipe):
    """Failure mode 35."""
    begin(recipe)
    save_checkpoint(recipe, 5, weights_only=True)
    with pytest.raises(UserError, match=r"without the state of optimizer.*\n?.*--warm-start"):
        open_folder(recipe)
    assert open_folder(recipe, warm=True).warm_start.name == "checkpoint-5"


def test_killed_between_the_steps_of_a_fresh_start(recipe, recipe_file, monkeypatch):
    """What an older run left is not taken for the new one's, nor the folder for somebody else's."""
    begin(recipe)
    save_checkpoint(recipe, 5)
    other = load_recipe(recipe_file(training={"learning_rate": 1e-3}))
    monkeypatch.setattr("lora_ft.training.run_folder.remove_run", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        begin(other, fresh=True)
    monkeypatch.undo()
    assert open_folder(other).clears and open_folder(other).resume_from is None
    begin(other)
    assert not list(recipe.output_dir.glob("checkpoint-*"))


def test_killed_between_the_steps_of_a_warm_start(recipe, recipe_file, monkeypatch):
    """The weights that were set aside are those to start from, not an older checkpoint that is still there."""
    begin(recipe)
    save_checkpoint(recipe, 5, value=5.0)
    save_checkpoint(recipe, 10, value=10.0)
    other = load_recipe(recipe_file(training={"learning_rate": 1e-3}))
    monkeypatch.setattr("lora_ft.training.run_folder.remove_run", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        begin(other, warm=True)
    monkeypatch.undo()
    shutil.rmtree(recipe.output_dir / "checkpoint-10")
    start = open_folder(other, warm=True).warm_start
    assert load_file(start / "adapter_model.safetensors")["lora_A"][0] == 10.0


def test_killed_before_the_first_manifest(recipe):
    recipe.output_dir.mkdir()
    (recipe.output_dir / ".lock").touch()
    (recipe.output_dir / ".run.json.1.partial").touch()
    assert open_folder(recipe).resume_from is None


def test_one_writer(recipe, recipe_file):
    run = open_folder(recipe)
    with claim_run_folder(run, recipe, {}):
        with pytest.raises(UserError, match=f"Process {os.getpid()} on .* is writing there"):
            open_folder(recipe)
        with pytest.raises(UserError, match="is writing there"), claim_run_folder(run, recipe, {}):
            pytest.fail("two writers")
    open_folder(recipe)


def test_lock_ends_with_its_process(recipe):
    """A killed process leaves no lock behind."""
    recipe.output_dir.mkdir()
    hold = (
        "import sys, time, pathlib\n"
        "from lora_ft.training.lock import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, recipe.output_dir], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"Process {holder.pid} on"), run_lock(recipe.output_dir):
        pytest.fail("two writers")
    holder.kill()
    holder.wait()
    with run_lock(recipe.output_dir):
        pass


def test_a_run_that_came_and_went_meanwhile_is_not_written_over(recipe, recipe_file):
    """Between check and claim lie the reading of the base, and minutes."""
    waiting = open_folder(load_recipe(recipe_file(training={"learning_rate": 1e-3})))
    finished = begin(recipe)
    before = write_manifest(finished, "finished", {})
    with pytest.raises(UserError, match="changed it meanwhile"), claim_run_folder(waiting, recipe, {}):
        pytest.fail("it was claimed")
    assert read_manifest(recipe.output_dir) == before


def test_a_run_that_ended_before_its_first_step_makes_way_for_any_other(recipe, recipe_file):
    """A setting that only the trainer refuses is mended, and the same command given again."""
    with claim_run_folder(open_folder(recipe), recipe, {}):
        pass
    mended = load_recipe(recipe_file(training={"learning_rate": 1e-3}))
    run = open_folder(mended)
    assert run.resume_from is None
    with claim_run_folder(run, mended, {}):
        pass
    assert read_manifest(recipe.output_dir)["identity"]["decisive"]["training"]["learning_rate"] == 1e-3


def test_folder_of_somebody_else(recipe):
    recipe.output_dir.mkdir()
    (recipe.output_dir / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="files that are no run's"):
        open_folder(recipe)
    with pytest.raises(UserError, match="files that are no run's"):
        open_folder(recipe, fresh=True)
    remove_run(recipe.output_dir)
    assert (recipe.output_dir / "thesis.tex").exists(), "only what runs write is removed"


def test_damaged_manifest(recipe):
    recipe.output_dir.mkdir()
    (recipe.output_dir / "run.json").write_text("{")
    with pytest.raises(UserError, match="This is not JSON"):
        open_folder(recipe)
    assert open_folder(recipe, fresh=True).resume_from is None
    (recipe.output_dir / "run.json").write_text(json.dumps({"some": "thing"}))
    assert read_manifest(recipe.output_dir) is None


def test_output_dir_that_is_a_file(recipe):
    recipe.output_dir.write_text("x")
    with pytest.raises(UserError, match="This is a file"):
        open_folder(recipe)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_dir_that_cannot_be_written(recipe, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written to"):
            open_folder(recipe)
    finally:
        tmp_path.chmod(0o700)


def test_no_space(recipe, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    run = open_folder(recipe)
    check_space(run, recipe, trainable_parameters=1000, base_bytes=0)
    with pytest.raises(UserError, match="writes about 100 MB there, and 1 MB are free"):
        check_space(run, recipe, trainable_parameters=2_500_000, base_bytes=0)
    assert not recipe.output_dir.exists()


def test_ranks_that_would_go_on_from_different_checkpoints_are_refused(recipe, monkeypatch, tmp_path):
    """As on two machines that share no disk: only the first one has what was saved."""
    identity = identify_run(recipe, "base", "data", 2, "ddp")
    ranks = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: ranks.extend(found) or list(ranks))
    refuse_disunity(identity, tmp_path / "checkpoint-20")
    with pytest.raises(UserError, match=r"checkpoint in output_dir: checkpoint-20\n  Rank 1 has None\.") as error:
        refuse_disunity(identity, None)
    assert len(error.value.faults) == 1
