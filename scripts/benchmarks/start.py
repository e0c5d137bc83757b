"""What a start costs: a 4-bit base quantised against one that was quantised before, `--help`, and a recipe's error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figure import Figure, Options, measure_call, run_worker, take_turns, time_command
from benchmarks.tasks import NF4, TASKS, build_task

TOPIC = "start"


def measure(options: Options) -> Iterator[Figure]:
    """Seconds and memory of both starts of the 0.63B base, and the quick answers of the command line."""
    folder = options.scratch / "start"
    build_task(TASKS["0.63B"], folder, options.data)
    cache, peaks = folder / "cache", []

    def quantise() -> float:
        return run_worker(TOPIC, folder / "base", "fresh", LORA_FT_CACHE=str(cache))["seconds"]

    def reload() -> float:
        found = run_worker(TOPIC, folder / "base", "cached", LORA_FT_CACHE=str(cache))
        peaks.append(found["peak_bytes"])
        return found["seconds"]

    seconds = take_turns({"quantise": quantise, "reload": reload}, options.rounds)
    yield Figure(TOPIC, "0.63B in 4 bit, quantising", seconds["quantise"], "s")
    yield Figure(TOPIC, "0.63B in 4 bit, again", seconds["reload"], "s")
    yield Figure(TOPIC, "quantising / again", seconds["quantise"] / seconds["reload"], "×", at_least=15)
    yield Figure(TOPIC, "peak memory above imports, again", max(peaks) / 1e9, "GB", at_most=0.6)
    yield from measure_answers(folder, options.rounds)


def measure_answers(folder: Path, rounds: int) -> Iterator[Figure]:
    """Seconds until the command line has said what it can say at once."""
    broken = folder / "broken.yaml"
    broken.write_text("output_dir: x\nmodel: {base: y}\nlora: {lora_alhpa: 1}\ndata: {sources: [{path: z}]}\n")
    ours, trl = [sys.executable, "-m", "lora_ft"], "import sys; from trl.cli import main; sys.exit(main())"
    seconds = take_turns(
        {
            "lora-ft --help": lambda: time_command([*ours, "--help"]).seconds,
            "trl sft --help": lambda: time_command([sys.executable, "-c", trl, "sft", "--help"]).seconds,
            "a recipe's error": lambda: time_command([*ours, "train", str(broken)], expected=2).seconds,
        },
        rounds,
    )
    goals = {"lora-ft --help": 0.3, "a recipe's error": 1.0}
    for name, value in seconds.items():
        yield Figure(TOPIC, name, value, "s", at_most=goals.get(name))


def work(base: str, state: str) -> dict[str, float]:
    """A start in this process, after the imports: `fresh` with an empty cache, or `cached`."""
    import bitsandbytes  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    from lora_ft.model.load import find_base, load_base
    from lora_ft.model.machine import probe_machine
    from lora_ft.model.quant_cache import clear_cached
    from lora_ft.sections import ModelSection

    probe_machine()
    if state == "fresh":
        clear_cached()
    identity, section = find_base(base), ModelSection(base, dtype="bfloat16", attn_implementation="sdpa")
    return measure_call(lambda: load_base(identity, section, NF4))
