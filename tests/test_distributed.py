"""Two CPU ranks under accelerate give the run of one process: DDP, ZeRO-2 and ZeRO-3 over a 4-bit base."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft.cli import main
from tests.conftest import make_base, recipe_writer

ROOT = Path(__file__).parents[1]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

pytestmark = pytest.mark.distributed


def launch(config: str, *words, script: str = "scripts/sft.py", timeout: int = 240) -> subprocess.CompletedProcess:
    """`accelerate launch` on scripts/sft.py, as the README has it, or on another script."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, script, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )


def read_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def need_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU communication when it starts, and there is no compiler")


def write_recipe(folder: Path, base: Path, rows: list[dict]) -> Path:
    """The recipe that one process and two ranks run."""
    write = recipe_writer(folder, base, rows)
    return write(quantization=NF4, training={"max_steps": 4}, evaluation={"generate": 2})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_base, chat_rows) -> Path:
    """The run of one process, which those of two ranks are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder, tiny_base, chat_rows)
    done = subprocess.run([sys.executable, "scripts/sft.py", str(recipe)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_ranks_are_one_run(config, alone, tmp_path, tiny_base, chat_rows):
    """Equal losses, an adapter that verifies, and both models evaluated, from the same global batch of four rows."""
    if "zero" in config:
        need_deepspeed()
    path, two = write_recipe(tmp_path, tiny_base, chat_rows), tmp_path / "run"
    is_merged = config == "cpu_ddp"  # reads the adapter from disk, whoever trained it
    together = launch(config, path, "training.per_device_train_batch_size=2", f"export.merge={str(is_merged).lower()}")
    assert together.returncode == 0, together.stderr[-4000:]
    manifest = json.loads((two / "run.json").read_text())
    assert manifest["machine"]["processes"] == 2
    assert manifest["verification"]["ok"]
    assert (two / "merged").exists() == is_merged
    assert read_losses(two) == pytest.approx(read_losses(alone), rel=0.01)
    manifests = {folder: json.loads((folder / "run.json").read_text()) for folder in (alone, two)}
    losses = {folder: manifest["evaluation"]["figures"]["loss"] for folder, manifest in manifests.items()}
    assert losses[two]["tuned"]["value"] == pytest.approx(losses[alone]["tuned"]["value"], rel=0.01)
    assert losses[two]["base"]["value"] == pytest.approx(losses[alone]["base"]["value"], rel=1e-4)
    assert main(["verify", str(two)]) == 0


TRAINED_WHOLE = {
    "drawn head": {"data": {"task": "classification"}, "evaluation": {"generate": 32, "max_new_tokens": 128}},
    "16-bit biases": {
        "model": {"dtype": "bfloat16"},
        "lora": {"bias": "all"},
        "training": {"learning_rate": 1e-3},  # small ones: DeepSpeed's linear layer rounds before it adds a bias
    },
}


@pytest.mark.parametrize("case", TRAINED_WHOLE)
def test_what_zero3_shards_before_it_is_trained(case, tmp_path, chat_rows):
    """The weights of the base that are trained lie in pieces when they are drawn, or made float32."""
    need_deepspeed()
    losses, labels = {}, [{"text": f"{i} {'red' * (i % 3)}", "label": "ab"[i % 2]} for i in range(24)]
    base = make_base(tmp_path / "base", attention_bias=True)
    rows = labels if "data" in TRAINED_WHOLE[case] else chat_rows
    for name in ("alone", "two"):
        (tmp_path / name).mkdir()
        path = recipe_writer(tmp_path / name, base, rows)(**TRAINED_WHOLE[case])
        if name == "alone":
            assert main(["train", str(path)]) == 0
        else:
            together = launch("cpu_zero3", path, "training.per_device_train_batch_size=2")
            assert together.returncode == 0, together.stderr[-4000:]
        losses[name] = read_losses(tmp_path / name / "run")
    assert losses["two"] == pytest.approx(losses["alone"], rel=0.01)


def test_ranks_call_a_sharded_head_equally_often(tmp_path):
    """One rank has two chunks of logits to score, the other one; each call gathers the head from both."""
    need_deepspeed()
    words = {True: "the battery is red " * 40, False: "red"}
    rows = [
        {"messages": [{"role": "user", "content": f"what {i}?"}, {"role": "assistant", "content": words[i % 2 == 0]}]}
        for i in range(24)
    ]
    base = make_base(tmp_path / "base", vocab_size=110_000)
    path = recipe_writer(tmp_path, base, rows)(
        data={"max_length": 400, "split": {"validation": 0, "test": 0}},
        training={"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1, "max_steps": 2},
    )
    together = launch("cpu_zero3", path)
    assert together.returncode == 0, together.stderr[-4000:]
    losses = read_losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert main(["train", str(path), "training.per_device_train_batch_size=2"]) == 0
    assert losses == pytest.approx(read_losses(tmp_path / "run"), rel=0.01)


def test_fault_of_a_recipe_is_said_once_and_ends_the_launch(recipe_file, tmp_path):
    done = launch("cpu_ddp", recipe_file(lora={"r": 0}))
    assert done.returncode != 0
    assert done.stderr.count("A rank is at least 1.") == 1
    assert not (tmp_path / "run").exists()


def test_ranks_that_would_train_two_runs_end_before_either(recipe_file, tmp_path):
    """As where a machine has an older recipe; the second rank would answer other calls than the first one makes."""
    script = tmp_path / "sft.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv += ['training.learning_rate=0.5', 'training.max_steps=7'] * (os.environ['RANK'] == '1')\n"
        "runpy.run_path('scripts/sft.py', run_name='__main__')\n"
    )
    done = launch("cpu_ddp", recipe_file(), script=str(script))
    assert done.returncode != 0
    assert done.stderr.count("training.learning_rate: 0.005\n  Rank 1 has 0.5.") == 1
    assert done.stderr.count("training.max_steps: 3\n  Rank 1 has 7.") == 1
    assert not (tmp_path / "run").exists()
