"""A run's folder belongs to one run; nothing is written before that is sure."""

import json
import os
import shutil
from collections import namedtuple

import pytest

from lora_ft.errors import UserError
from lora_ft.recipe import load_recipe
from lora_ft.training.checkpoint import (
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


def open_folder(recipe, fresh=False, base="base", data="data"):
    return check_run_folder(recipe, base, data, fresh)


def test_new_folder_is_not_touched_by_the_check(recipe):
    run = open_folder(recipe)
    assert run.resume_from is None and not recipe.output_dir.exists()


def test_unfinished_run_goes_on_from_its_newest_whole_checkpoint(recipe):
    claim_run_folder(open_folder(recipe), recipe, {}, fresh=False)
    assert open_folder(recipe).resume_from is None
    for step, whole in {5: True, 10: True, 15: False}.items():
        folder = recipe.output_dir / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert open_folder(recipe).resume_from == recipe.output_dir / "checkpoint-10"


def test_finished_run_is_refused_unless_fresh(recipe):
    run = open_folder(recipe)
    claim_run_folder(run, recipe, {}, fresh=False)
    (recipe.output_dir / "adapter").mkdir()
    (recipe.output_dir / "mine.txt").write_text("keep")
    manifest = write_manifest(run, "finished", {})
    assert set(manifest["files"]) == {"recipe.yaml", "mine.txt"}
    with pytest.raises(UserError, match="holds this very run, finished"):
        open_folder(recipe)
    claim_run_folder(open_folder(recipe, fresh=True), recipe, {}, fresh=True)
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
    claim_run_folder(open_folder(recipe), recipe, {}, fresh=False)
    with pytest.raises(UserError) as caught:
        open_folder(load_recipe(recipe_file(**section)))
    assert expected in str(caught.value)


@pytest.mark.parametrize("other", [{"base": "another"}, {"data": "another"}])
def test_another_base_or_data_is_refused(recipe, other):
    claim_run_folder(open_folder(recipe), recipe, {}, fresh=False)
    with pytest.raises(UserError, match=f"made with another {next(iter(other))}"):
        open_folder(recipe, **other)


def test_harmless_settings_may_change(recipe, recipe_file):
    claim_run_folder(open_folder(recipe), recipe, {}, fresh=False)
    open_folder(load_recipe(recipe_file(training={"logging_steps": 7, "save_total_limit": 1})))


def test_folder_of_somebody_else(recipe):
    recipe.output_dir.mkdir()
    (recipe.output_dir / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="files that are no run's"):
        open_folder(recipe)
    with pytest.raises(UserError, match="files that are no run's"):
        open_folder(recipe, fresh=True)
    remove_run(recipe.output_dir)
    assert (recipe.output_dir / "thesis.tex").exists()


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
    with pytest.raises(UserError, match=r"writes about 0\.10 GB there, and 0\.00 GB are free"):
        check_space(run, recipe, trainable_parameters=2_500_000, base_bytes=0)
    assert not recipe.output_dir.exists()
