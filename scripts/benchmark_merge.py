"""What a merge costs: time against copying the file and against PEFT, and memory, at several sizes.

    python scripts/benchmark_merge.py
    python scripts/benchmark_merge.py --worker ours BASE ADAPTER OUT     one measured run in a process of its own

Every run is a fresh process, timed after its imports; memory is the peak above what was held then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RUNS = 3
"""Runs of each measurement; the fastest counts, as others share the machine."""


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped base to merge."""

    hidden: int
    """Hidden size; the MLP is three times as wide."""
    layers: int
    """Number of layers."""
    vocabulary: int
    """Rows of the embeddings."""


SHAPES = {
    "0.3 GB": Shape(1024, 8, 32_000),
    "0.6 GB": Shape(1024, 20, 32_000),
    "1.2 GB": Shape(1024, 44, 32_000),
}
"""Bases of one tensor size and growing depth, to show that memory does not grow with the model."""


@dataclass(frozen=True)
class Measurement:
    """What one run took."""

    seconds: float
    """Wall time after imports."""
    cpu_seconds: float
    """Time of all cores, which others on the machine do not stretch."""
    peak_bytes: int
    """Largest resident memory above what was held after the imports."""


@dataclass(frozen=True)
class Row:
    """A base merged three ways."""

    base: str
    """Size of the base's weights."""
    copy: Measurement
    """The weights copied."""
    ours: Measurement
    """The streaming merge."""
    peft: Measurement
    """PEFT's `merge_and_unload`, and `save_pretrained`."""
    adapter_bytes: int
    """Size of the adapter, which is held in memory."""
    largest_bytes: int
    """Size of the largest tensor in fp32."""

    def __str__(self) -> str:
        """The figures, and the ratios; those that must be reached at 1.2 GB stand behind."""
        allowed = self.adapter_bytes + 2.5 * self.largest_bytes
        return (
            f"{self.base}: copy {self.copy.seconds:.2f} s, merge {self.ours.seconds:.2f} s,"
            f" PEFT {self.peft.seconds:.2f} s"
            f" (CPU {self.copy.cpu_seconds:.2f}, {self.ours.cpu_seconds:.2f}, {self.peft.cpu_seconds:.2f} s);"
            f" {self.ours.seconds / self.copy.seconds:.1f}× the copy (≤ 3),"
            f" {self.peft.seconds / self.ours.seconds:.1f}× faster than PEFT (≥ 2.5);"
            f" peak {self.ours.peak_bytes / 1e6:.0f} MB (≤ {allowed / 1e6:.0f}),"
            f" {(self.ours.peak_bytes - self.adapter_bytes) / 1e6:.0f} MB beside the adapter;"
            f" PEFT {self.peft.peak_bytes / 1e6:.0f} MB"
        )


def build_case(shape: Shape, folder: Path) -> None:
    """A base in bf16 and a LoRA of rank 16 on all its linear layers, with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=shape.vocabulary,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)


def merge_ours(base: Path, adapter: Path, out: Path) -> None:
    """The streaming merge, without the proof after it, which the others do not have."""
    from lora_ft.export.merge import merge_adapter

    merge_adapter(adapter, out, base=str(base), prove=False)


def merge_peft(base: Path, adapter: Path, out: Path) -> None:
    """Stock PEFT, in the base's own type, as most people do it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)


def copy_base(base: Path, adapter: Path, out: Path) -> None:
    """The base's weights copied, and forced to disk as a merge is."""
    out.mkdir()
    for path in base.glob("*.safetensors"):
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb") as stream:
            os.fsync(stream.fileno())


WORKERS: dict[str, Callable[[Path, Path, Path], None]] = {"ours": merge_ours, "peft": merge_peft, "copy": copy_base}


def run_worker(name: str, base: Path, adapter: Path, out: Path) -> None:
    """One run in this process, its measurement printed as JSON."""
    import peft
    import torch
    import transformers  # noqa: F401
    from peft import tuners  # noqa: F401

    import lora_ft.export.merge  # noqa: F401

    torch.ones(512, 512) @ torch.ones(512, 512)
    peft.LoraConfig()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before, started, cpu_started = memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
    WORKERS[name](base, adapter, out)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = memory_bytes("VmHWM")
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak - before}))


def memory_bytes(field: str) -> int:
    """A field of this process's memory: `VmRSS`, what is resident, or `VmHWM`, the most that was.

    `getrusage` would not do: its peak starts from that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str, folder: Path) -> Measurement:
    """The fastest of several runs of one worker on the case in `folder`."""
    found = []
    for _ in range(RUNS):
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, __file__, "--worker", name, *map(str, (folder / "base", folder / "adapter", out))]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(Measurement(**json.loads(result.stdout.splitlines()[-1])))
        shutil.rmtree(out)
    return min(found, key=lambda measurement: measurement.seconds)


def benchmark_merge(scratch: Path) -> Iterator[Row]:
    """One row a size, from the smallest to the largest base."""
    for label, shape in SHAPES.items():
        folder = scratch / label.replace(" ", "")
        build_case(shape, folder)
        copy, ours, peft = (measure(name, folder) for name in ("copy", "ours", "peft"))
        adapter_bytes = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        yield Row(label, copy, ours, peft, adapter_bytes, 4 * shape.hidden * shape.vocabulary)
        shutil.rmtree(folder)


def main() -> None:
    """The table, printed."""
    if sys.argv[1:2] == ["--worker"]:
        run_worker(sys.argv[2], *map(Path, sys.argv[3:6]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for row in benchmark_merge(Path(scratch)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
