"""A run in processes of its own is stopped, killed and gone on with, alone and on two ranks."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_ft.fingerprint import hash_tensors
from lora_ft.training.checkpoint import find_intact, list_checkpoints

ROOT = Path(__file__).parents[1]
LONG = {"max_steps": 150, "save_strategy": "steps", "save_steps": 20, "eval_strategy": "no"}
NO_TEST = {"split": {"validation": 0.1, "test": 0.0}}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None, reason="needs deepspeed and g++"
)
TWO_RANKS = [pytest.param("cpu_ddp"), pytest.param("cpu_zero2", marks=NEEDS_DEEPSPEED)]


def start(*words, config=None):
    """The command, running; with a launcher, as the README has it."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    command = [*launcher, "scripts/sft.py"] if config else ["-m", "lora_ft", "train"]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )


def wait_for_step(process, folder, step, seconds=150):
    """Returns when the run has logged that step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        log = folder / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= step:
            return
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        time.sleep(0.02)
    process.kill()
    pytest.fail("the run does not get on")


def ranks_of(launcher):
    """The processes of the ranks, in their order."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = {}
    for child in children:
        if any(word.endswith("sft.py") for word in child.cmdline()):
            ranks[int(child.environ()["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def finished_hash(folder):
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["state"] == "finished" and manifest["verification"]["ok"]
    return hash_tensors(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signal_saves_and_names_the_command_that_goes_on(recipe_file, tmp_path, number):
    """Exit code 130; what is printed, given to a shell, finishes the run."""
    path, run = recipe_file(training=LONG, data=NO_TEST), tmp_path / "run"
    process = start(path, "--fresh", "training.seed=3")
    wait_for_step(process, run, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"Stopped by {number.name} after step" in err and "Traceback" not in err
    assert re.search(r"training .* \d+/150 steps, .* left.*loss=", err), "the bar is seen, with the loss"
    (newest, *_) = list_checkpoints(run)
    assert f"{newest.name} is saved" in err and find_intact(run) == newest
    assert not (run / "adapter").exists()
    command = err.strip().splitlines()[-1].strip()
    assert "--fresh" not in command and shlex.split(command)[-2:] == [str(path), "training.seed=3"]
    again = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"going on from {newest}" in again.stderr
    finished_hash(run)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", TWO_RANKS)
def test_ranks_agree_to_stop_and_go_on_exactly(recipe_file, tmp_path, config):
    """Failure mode 35 on two ranks: one of them gets the signal, both stop after the same step; then one is killed."""
    training = {**LONG, "max_steps": 40, "save_steps": 10, "per_device_train_batch_size": 2}
    lora = {"lora_dropout": 0.1}
    path = recipe_file(training=training, data=NO_TEST, lora=lora)
    whole = start(path, f"output_dir={tmp_path / 'whole'}", config=config)
    assert whole.wait(timeout=200) == 0, whole.communicate()[1]
    run = tmp_path / "run"
    stopped = start(path, config=config)
    wait_for_step(stopped, run, 3)
    ranks_of(stopped)[1].send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode != 0 and "is saved" in err, err
    (newest, *_) = list_checkpoints(run)
    assert find_intact(run) == newest
    killed = start(path, config=config)
    wait_for_step(killed, run, int(newest.name.rpartition("-")[2]) + 2)
    ranks_of(killed)[1].kill()
    began = time.monotonic()
    killed.communicate(timeout=60)
    assert killed.returncode != 0, "failure mode 47: the launch ends, and says that it failed"
    assert time.monotonic() - began < 60
    last = start(path, config=config)
    _, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    assert finished_hash(run) == finished_hash(tmp_path / "whole")


@pytest.mark.distributed
def test_uneven_rows_hang_nobody_and_count_once(recipe_file, tmp_path, chat_rows):
    """Failure mode 47: 11 training rows and 3 validation rows on two ranks."""
    rows = {"train": chat_rows[:11], "validation": chat_rows[11:14]}
    sources = []
    for name, some in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        sources.append({"path": str(file), "split": name})
    training = {"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch", "eval_on_start": True}
    training |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    path = recipe_file(training=training, data={"sources": sources, "split": {"validation": 0.0, "test": 0.0}})
    losses = {}
    for name, config in {"one": None, "two": "cpu_ddp"}.items():
        process = start(path, f"output_dir={tmp_path / name}", config=config)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = next(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-6)


@pytest.mark.slow
def test_full_disk_in_the_middle(recipe_file, tmp_path):
    """Failure mode 37: files may not grow beyond a limit, which ends the save of a checkpoint."""
    limited = (
        "import resource, sys\n"
        "from lora_ft.cli import main\n"
        "import lora_ft.training.lasting as room\n"
        "draft = room.draft_checkpoint\n"
        "def full(run, step):\n"
        "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    return draft(run, step)\n"
        "room.draft_checkpoint = full\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    training = {**LONG, "max_steps": 6, "save_steps": 2}
    path, run = recipe_file(training=training, data=NO_TEST), tmp_path / "run"
    command = [sys.executable, "-c", limited, "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "checkpoint-4" in done.stderr and "What was saved before is as it was" in done.stderr
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    assert find_intact(run) == run / "checkpoint-2"
    again = start(path)
    _, err = again.communicate(timeout=100)
    assert again.returncode == 0 and "going on from" in err, err


def test_two_commands_on_one_folder(recipe_file, tmp_path):
    path, run = recipe_file(training=LONG, data=NO_TEST), tmp_path / "run"
    first = start(path)
    wait_for_step(first, run, 2)
    first.send_signal(signal.SIGSTOP)  # or it may have ended before the second one has loaded its libraries
    second = start(path)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and f"Process {first.pid} on" in err, err
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_warm_start_takes_weights_along(recipe_file, tmp_path):
    """Another learning rate is refused with both ways on; with --warm-start a new run begins with the old weights."""
    path, run = recipe_file(training={"max_steps": 2}, data=NO_TEST, evaluation={"generate": 0}), tmp_path / "run"
    assert start(path).wait(timeout=100) == 0
    trained = hash_tensors(run / "adapter" / "adapter_model.safetensors")
    other = "training.learning_rate=1e-4"
    refused = start(path, other)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "--fresh" in err and "--warm-start" in err
    unfit = start(path, "lora.r=8", "--warm-start")
    _, err = unfit.communicate(timeout=60)
    assert unfit.returncode == 2 and "These weights do not fit this adapter" in err
    assert hash_tensors(run / "adapter" / "adapter_model.safetensors") == trained, "a refusal removes nothing"
    warm = start(path, other, "--warm-start")
    _, err = warm.communicate(timeout=100)
    assert warm.returncode == 0 and "starting from the weights in" in err, err
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["identity"]["decisive"]["warm_start"] == trained != finished_hash(run)
    assert hash_tensors(run / "warm_start" / "adapter_model.safetensors") == trained
