"""Two CPU ranks under accelerate give the run of one process: DDP, ZeRO-2 and ZeRO-3 over a 4-bit base."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

pytestmark = pytest.mark.distributed


def launch(config: str, *words, timeout: int = 240) -> subprocess.CompletedProcess:
    """`accelerate launch` on scripts/sft.py, as the README has it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, "scripts/sft.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )


def read_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_ranks_are_one_run(config, recipe_file, tmp_path):
    """Equal losses, an adapter that verifies, and both models evaluated, from the same global batch of four rows."""
    if "zero" in config:
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its CPU communication when it starts, and there is no compiler")
    path = recipe_file(quantization=NF4, training={"max_steps": 4}, evaluation={"generate": 2}, export={"merge": True})
    one, two = tmp_path / "one", tmp_path / "two"
    alone = subprocess.run(
        [sys.executable, "scripts/sft.py", str(path), f"output_dir={one}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    together = launch(config, path, f"output_dir={two}", "training.per_device_train_batch_size=2")
    assert together.returncode == 0, together.stderr[-4000:]
    manifest = json.loads((two / "run.json").read_text())
    assert manifest["machine"]["processes"] == 2
    assert manifest["verification"]["ok"]
    assert read_losses(two) == pytest.approx(read_losses(one), rel=0.01)
    manifests = {folder: json.loads((folder / "run.json").read_text()) for folder in (one, two)}
    losses = {folder: manifest["evaluation"]["figures"]["loss"] for folder, manifest in manifests.items()}
    assert losses[two]["tuned"]["value"] == pytest.approx(losses[one]["tuned"]["value"], rel=0.01)
    assert losses[two]["base"]["value"] == pytest.approx(losses[one]["base"]["value"], rel=1e-4)
    verified = subprocess.run([sys.executable, "-m", "lora_ft", "verify", str(two)], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_fault_of_a_recipe_is_said_once_and_ends_the_launch(recipe_file, tmp_path):
    done = launch("cpu_ddp", recipe_file(lora={"r": 0}))
    assert done.returncode != 0
    assert done.stderr.count("A rank is at least 1.") == 1
    assert not (tmp_path / "run").exists()
