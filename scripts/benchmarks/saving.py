"""What checkpoints cost: seconds of saving beside seconds of training, in the quickstart, and by an adapter's size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure, Options, run_worker, take_turns

PARAMETERS = 40_000_000
"""Rank 16 on every linear layer of a 7B model."""


def measure(options: Options) -> Iterator[Figure]:
    """The share that saving takes of a run at its default interval, and the steps of saving one large adapter."""
    runs: list[dict[str, float]] = []

    def share() -> float:
        runs.append(run_worker("saving", "run", options.scratch / str(len(runs))))
        return 100 * runs[-1]["save_seconds"] / runs[-1]["train_seconds"]

    found = take_turns({"share": share}, options.rounds)["share"]
    yield Figure("saving", "quickstart, an epoch apart: saves", runs[0]["saves"], "")
    yield Figure("saving", "quickstart: share of training", found, "%", at_most=5)
    for name, seconds in run_worker("saving", "size", options.scratch / "size").items():
        yield Figure("saving", f"{PARAMETERS / 1e6:.0f} million parameters with Adam's moments: {name}", seconds, "s")


def work(task: str, folder: str) -> dict[str, float]:
    """`run` or `size` in this process."""
    return measure_run(Path(folder)) if task == "run" else measure_size(Path(folder))


def measure_run(folder: Path) -> dict[str, float]:
    """Seconds of the quickstart's training, and of the saving in it."""
    import lora_ft.training.lasting as room
    from lora_ft.recipe import load_recipe
    from lora_ft.run import run_recipe

    saves: list[float] = []
    write = room.LastingTrainer._write_checkpoint

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        write(*arguments)
        saves.append(time.perf_counter() - started)

    room.LastingTrainer._write_checkpoint = timed  # type: ignore[method-assign,assignment]
    overrides = [f"output_dir={folder}", "export.merge=false", "evaluation.generate=0"]
    result = run_recipe(load_recipe("builtin:quickstart", overrides), quiet=True)
    assert result is not None, "one process is the first rank"
    seconds = result.manifest["training"]["train_runtime"]
    return {"train_seconds": seconds, "saves": len(saves), "save_seconds": sum(saves)}


def measure_size(folder: Path) -> dict[str, float]:
    """Seconds to write, to hash and sync, and to check a checkpoint of a large adapter."""
    import torch
    from safetensors.torch import save_file

    from lora_ft.training.checkpoint import draft_checkpoint, find_damage, seal_checkpoint

    weights = torch.randn(PARAMETERS)
    started = time.perf_counter()
    draft = draft_checkpoint(folder, 1)
    save_file({"lora": weights}, draft / "adapter_model.safetensors")
    torch.save({"exp_avg": weights, "exp_avg_sq": weights.clone()}, draft / "optimizer.pt")
    written = time.perf_counter()
    sealed = seal_checkpoint(draft, weights_only=False)
    done = time.perf_counter()
    assert find_damage(sealed) is None
    return {"write": written - started, "hash and sync": done - written, "check": time.perf_counter() - done}
