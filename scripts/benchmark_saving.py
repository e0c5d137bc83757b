"""What checkpoints cost: seconds of saving beside seconds of training, in a real run and for adapters of a given size.

python scripts/benchmark_saving.py                       # builtin:quickstart at its default interval, an epoch
python scripts/benchmark_saving.py --parameters 40e6     # rank 16 on every linear layer of a 7B model
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure_run(folder: Path) -> dict[str, Any]:
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
    overrides = [f"output_dir={folder / 'run'}", "export.merge=false", "evaluation.generate=0"]
    result = run_recipe(load_recipe("builtin:quickstart", overrides), quiet=True)
    assert result is not None
    seconds = result.manifest["training"]["train_runtime"]
    return {"train_seconds": seconds, "saves": len(saves), "save_seconds": sum(saves), "share": sum(saves) / seconds}


def measure_size(folder: Path, num_parameters: int) -> dict[str, Any]:
    """Seconds to write, hash and sync a checkpoint of an adapter of that size with Adam's moments, and to check it."""
    import torch
    from safetensors.torch import save_file

    from lora_ft.training.checkpoint import draft_checkpoint, find_damage, seal_checkpoint

    weights = torch.randn(num_parameters)
    started = time.perf_counter()
    draft = draft_checkpoint(folder, 1)
    save_file({"lora": weights}, draft / "adapter_model.safetensors")
    torch.save({"exp_avg": weights, "exp_avg_sq": weights.clone()}, draft / "optimizer.pt")
    written = time.perf_counter()
    sealed = seal_checkpoint(draft, weights_only=False)
    done = time.perf_counter()
    assert find_damage(sealed) is None
    num_bytes = sum(path.stat().st_size for path in sealed.iterdir())
    seconds = {"write": written - started, "hash_and_sync": done - written, "check": time.perf_counter() - done}
    return {"bytes": num_bytes, **{f"{name}_seconds": value for name, value in seconds.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, help="size of an adapter to save, instead of a run")
    parser.add_argument("--folder", help="where to write; the system's temporary folder if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        figures = measure_size(folder, int(options.parameters)) if options.parameters else measure_run(folder)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
