"""Training compared with TRL's command line and with loops written by hand: the same base, rows, order and settings.

Every run is a process of its own, and the systems take turns. The matrix products of the task's tokens, at the rate
this machine multiplies in the type we compute in, are what no system can go below.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figure import ENTRY, Figure, Options, run_worker, time_command
from benchmarks.tasks import BATCH, LORA, NF4, RATE, TASKS, Task, build_task

CHECKPOINTING = "ours, checkpointing"
"""Ours with gradient checkpointing, which TRL's command line has by default, and we where memory asks for it."""
SLOW = ("trl",)
"""What takes minutes where others take seconds: a third of the rounds."""


@dataclass(frozen=True)
class Run:
    """What one run took."""

    loop_seconds: float
    """Wall time of the training loop."""
    command_seconds: float
    """Wall time of the whole process."""
    peak_bytes: int
    """Peak resident memory of the process."""
    loss: float
    """Mean training loss over the run."""


def measure(options: Options, names: tuple[str, ...] = tuple(TASKS)) -> Iterator[Figure]:
    """Seconds, memory and loss of each system on each task, and ratios to ours."""
    for name in names:
        folder = options.scratch / name
        build_task(TASKS[name], folder, options.data)
        systems = ["ours", "trl", *(["padded loop", "packed loop"] if name == "58M" else [CHECKPOINTING])]
        measure_run(folder, "ours")  # quantises once; what is measured is any later start
        runs: dict[str, list[Run]] = {system: [] for system in systems}
        floors = []
        for number in range(options.rounds):
            floors.append(run_worker("train", "floor", name, folder)["seconds"])
            for system in systems:
                if system not in SLOW or number % 3 == 0:
                    runs[system].append(measure_run(folder, system))
        medians = {system: summarise(found) for system, found in runs.items()}
        yield from describe_systems(name, medians)
        yield from compare_systems(name, medians, statistics.median(floors))


def describe_systems(name: str, medians: dict[str, Run]) -> Iterator[Figure]:
    """What each system took."""
    for system, run in medians.items():
        yield Figure(f"train {name}", f"{system}: training loop", run.loop_seconds, "s")
        yield Figure(f"train {name}", f"{system}: whole command", run.command_seconds, "s")
        yield Figure(f"train {name}", f"{system}: peak memory", run.peak_bytes / 1e9, "GB")
        yield Figure(f"train {name}", f"{system}: mean loss", run.loss, "nats")


def compare_systems(name: str, medians: dict[str, Run], floor_seconds: float) -> Iterator[Figure]:
    """The ratios to ours, with what was promised on two cores."""
    ours, trl, topic = medians["ours"], medians["trl"], f"train {name}"
    difference = 100 * abs(ours.loss - trl.loss) / trl.loss
    if name == "58M":
        packed = medians["packed loop"]
        yield Figure(topic, "loop: TRL / ours", trl.loop_seconds / ours.loop_seconds, "×", at_least=10)
        yield Figure(topic, "loop: packed by hand / ours", packed.loop_seconds / ours.loop_seconds, "×", at_least=1.6)
        yield Figure(topic, "loop: ours / matrix products alone", ours.loop_seconds / floor_seconds, "×", at_most=2.6)
        yield Figure(topic, "ours: whole command, promised", ours.command_seconds, "s", at_most=10)
        yield Figure(topic, "ours: peak memory, promised", ours.peak_bytes / 1e9, "GB", at_most=1.8)
    else:
        scarce = medians[CHECKPOINTING]
        yield Figure(topic, "loop: TRL / ours", trl.loop_seconds / ours.loop_seconds, "×", at_least=3)
        yield Figure(topic, "peak memory: ours / TRL", ours.peak_bytes / trl.peak_bytes, "×", at_most=0.5)
        yield Figure(topic, f"loop: TRL / {CHECKPOINTING}", trl.loop_seconds / scarce.loop_seconds, "×", at_least=3)
        yield Figure(topic, f"peak memory: {CHECKPOINTING} / TRL", scarce.peak_bytes / trl.peak_bytes, "×", at_most=0.5)
        yield Figure(topic, "loop: ours / matrix products alone", ours.loop_seconds / floor_seconds, "×")
    yield Figure(topic, "mean loss: difference to TRL", difference, "%", at_most=0.5)


def summarise(runs: list[Run]) -> Run:
    """The median of each figure."""
    return Run(**{field: statistics.median(getattr(run, field) for run in runs) for field in Run.__dataclass_fields__})


def measure_run(folder: Path, system: str) -> Run:
    """One run of a system in a process of its own."""
    done = time_command(command_of(folder, system), HF_HUB_OFFLINE="1", LORA_FT_CACHE=str(folder / "cache"))
    keys = ("train_runtime", "train_loss")
    loop, loss = (float(re.findall(rf"{key}['\"]: ['\"]?([\d.]+)", done.output)[-1]) for key in keys)
    return Run(loop, done.seconds, done.peak_bytes, loss)


def command_of(folder: Path, system: str) -> list[str]:
    """The command line of a system."""
    if system in ("ours", CHECKPOINTING):
        options = ["training.gradient_checkpointing=true"] if system == CHECKPOINTING else []
        return [sys.executable, "-m", "lora_ft", "train", str(folder / "recipe.yaml"), *options, "--fresh", "--json"]
    if system != "trl":
        return [sys.executable, str(ENTRY), "--worker", "train", system, folder.name, str(folder)]
    import torch

    return [
        *(sys.executable, "-c", "import sys; from trl.cli import main; sys.exit(main())", "sft"),
        *("--model_name_or_path", str(folder / "base"), "--dataset_name", str(folder / "trl")),
        *("--load_in_4bit", "--use_bnb_nested_quant", "--use_peft", "--lora_r", "16", "--lora_alpha", "32"),
        *("--lora_target_modules", "all-linear", "--lora_dropout", "0", "--learning_rate", str(RATE)),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", str(BATCH), "--logging_steps", "1"),
        *("--train_sampling_strategy", "sequential", "--output_dir", str(folder / "out")),
        *("--report_to", "none", "--save_strategy", "no", *([] if torch.cuda.is_available() else ["--use_cpu"])),
    ]


def work(system: str, name: str, folder: str) -> dict[str, float]:
    """The matrix products alone, or a loop written by hand, in this process."""
    return time_floor(TASKS[name], Path(folder)) if system == "floor" else run_loop(system, Path(folder))


def time_floor(task: Task, folder: Path) -> dict[str, float]:
    """Seconds of the task if it were nothing but matrix products: forwards, and backwards to the inputs.

    The rate is the best of thirty products of a layer's shape and a step's tokens.
    """
    import torch
    from transformers import AutoConfig

    from lora_ft.model.profile import profile_model

    device, dtype = compute_on()
    profile = profile_model(AutoConfig.from_pretrained(folder / "base"), "bfloat16", LORA)
    counts = json.loads((folder / "counts.json").read_text())
    head = task.shape["vocab_size"] * task.shape["hidden_size"]
    operations = 4 * (profile.linear_parameters * counts["tokens"] + head * counts["supervised"])
    sizes = int(task.shape["hidden_size"]), int(task.shape["intermediate_size"])
    left = torch.ones(counts["tokens"] * BATCH // task.num_rows, sizes[0], dtype=dtype, device=device)
    right = torch.ones(*sizes, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(20):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 20)
    return {"seconds": operations * best / (2 * left.numel() * sizes[1])}


def compute_on() -> tuple[str, Any]:
    """Device and type that this machine computes fastest with, as we choose them."""
    import torch

    from lora_ft.model.machine import probe_machine

    machine = probe_machine()
    return machine.device.partition(":")[0], torch.bfloat16 if machine.native_bf16 else torch.float32


def run_loop(system: str, folder: Path) -> dict[str, float]:
    """A loop written by hand, as a person would who knows transformers and PEFT well."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    device, dtype = compute_on()
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    options = {"dtype": dtype, "quantization_config": quantization, "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    set_seed(42)
    model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")).train()
    rows = json.loads((folder / "tokens.json").read_text())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(rows) // BATCH)
    losses, started = [], time.perf_counter()
    for start in range(0, len(rows), BATCH):
        inputs, labels = COLLATORS[system](rows[start : start + BATCH])
        inputs, labels = {key: value.to(device) for key, value in inputs.items()}, labels.to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            inner = model.get_base_model()
            hidden = inner.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
            chosen = labels[:, 1:] != -100
            loss = torch.nn.functional.cross_entropy(inner.lm_head(hidden[chosen]).float(), labels[:, 1:][chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"train_runtime": time.perf_counter() - started, "train_loss": statistics.mean(losses)}


def collate_padded(rows: list[list[Any]]) -> tuple[dict[str, Any], Any]:
    """One row each, filled up to the longest."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    labels = [[-100] * prompt + ids[prompt:] + [-100] * (width - len(ids)) for ids, prompt in rows]
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor(labels)


def collate_packed(rows: list[list[Any]]) -> tuple[dict[str, Any], Any]:
    """All in one row; positions restart, from which transformers makes a dense mask."""
    import torch

    ids = torch.tensor([[token for ids, _ in rows for token in ids]])
    positions = torch.tensor([[place for ids, _ in rows for place in range(len(ids))]])
    labels = torch.tensor([[label for ids, prompt in rows for label in [-100] * prompt + ids[prompt:]]])
    return {"input_ids": ids, "position_ids": positions}, labels


COLLATORS: dict[str, Callable[[list[list[Any]]], tuple[dict[str, Any], Any]]] = {
    "padded loop": collate_padded,
    "packed loop": collate_packed,
}
