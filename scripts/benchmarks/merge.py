"""What a merge costs: time against copying the file and against PEFT, and memory, at several sizes.

Every run is a fresh process, timed after its imports; memory is the peak above what was held then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure, Options, measure_call, run_worker, take_turns


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


WORKERS: dict[str, Callable[[Path, Path, Path], None]] = {
    "copy": copy_base,
    "merge": merge_ours,
    "PEFT": merge_peft,
}


def work(name: str, folder: str) -> dict[str, float]:
    """One run in this process, after the imports."""
    import peft
    import torch
    import transformers  # noqa: F401
    from peft import tuners  # noqa: F401

    import lora_ft.export.merge  # noqa: F401

    torch.ones(512, 512) @ torch.ones(512, 512)
    peft.LoraConfig()
    base, adapter, out = (Path(folder) / part for part in ("base", "adapter", "out"))
    shutil.rmtree(out, ignore_errors=True)
    return measure_call(lambda: WORKERS[name](base, adapter, out))


def measure(options: Options) -> Iterator[Figure]:
    """Seconds and memory at each size, from the smallest to the largest base; promised at the largest."""
    for label, shape in SHAPES.items():
        folder = options.scratch / label.replace(" ", "")
        build_case(shape, folder)
        yield from measure_size(label, shape, folder, options.rounds)
        shutil.rmtree(folder)


def measure_size(label: str, shape: Shape, folder: Path, rounds: int) -> Iterator[Figure]:
    """The three ways in turns on one base."""
    peaks: dict[str, list[float]] = {name: [] for name in WORKERS}

    def turn(name: str) -> Callable[[], float]:
        def run() -> float:
            found: dict[str, Any] = run_worker("merge", name, folder)
            peaks[name].append(found["peak_bytes"])
            return float(found["seconds"])

        return run

    seconds, topic = take_turns({name: turn(name) for name in WORKERS}, rounds), f"merge {label}"
    is_largest = label == list(SHAPES)[-1]
    adapter_bytes = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    allowed = (adapter_bytes + 2.5 * 4 * shape.hidden * shape.vocabulary) / 1e6
    for name, value in seconds.items():
        yield Figure(topic, name, value, "s")
    yield Figure(topic, "merge / copy", seconds["merge"] / seconds["copy"], "×", at_most=3.0 if is_largest else None)
    yield Figure(topic, "PEFT / merge", seconds["PEFT"] / seconds["merge"], "×", at_least=2.5 if is_largest else None)
    yield Figure(topic, "merge: peak memory above imports", max(peaks["merge"]) / 1e6, "MB", at_most=allowed)
    yield Figure(topic, "merge: of it the adapter", adapter_bytes / 1e6, "MB")
    yield Figure(topic, "PEFT: peak memory above imports", max(peaks["PEFT"]) / 1e6, "MB")
