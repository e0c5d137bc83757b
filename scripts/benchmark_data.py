"""What preparing, auditing and packing data costs: against TRL, against the tokenizer alone, and as the data grows.

    python scripts/benchmark_data.py [--rows 20000] [--runs 3] [--only speed] [--json]
    python scripts/benchmark_data.py --worker prepare ROWS.jsonl          one measured run in a process of its own

Ours is timed from a JSONL file to rows on disk, synced; TRL's `_prepare_dataset` from a data set in memory, which gives
it a head start. Systems take turns in each round; medians count, and their ratios are what to compare across machines.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it should be."""

    name: str
    """What was measured."""
    value: float
    """The number."""
    unit: str
    """Its unit."""
    target: str
    """What it should be; empty where it only explains another."""


def find_texts() -> list[tuple[str, str]]:
    """Questions and answers of real text: GSM8K where it is at hand, otherwise the embedded support desk."""
    repository = Path(__file__).parents[1]
    folder = Path(os.environ.get("LORA_FT_DATA", repository.parent / "shared" / "data"))
    if (folder / "gsm8k_train.json").exists():
        rows = json.loads((folder / "gsm8k_train.json").read_bytes())
        return [(row["instruction"], row["output"]) for row in rows]
    lines = (repository / "lora_ft/builtin/data/halden/train.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    return [(talk[0] * 4, talk[1] * 4) for talk in talks]


def make_rows(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of two questions and two answers, each with a number of its own."""
    texts = find_texts()
    for number in range(count):
        (first, one), (second, two) = texts[number % len(texts)], texts[(7 * number + 3) % len(texts)]
        turns = [("user", f"({number}) {first}"), ("assistant", one), ("user", second), ("assistant", two)]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_rows(path: Path, count: int) -> Path:
    """The rows as a JSONL file."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in make_rows(count))
    return path


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with 16,000 tokens, trained on the texts, saved in `folder` for other processes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((text for pair in find_texts() for text in pair), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that `make_tokenizer` saved."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# --- the systems ------------------------------------------------------------------------------------------------


def make_section(path: Path, cache: Path) -> Any:
    """Our data section for one file; the cache is `cache`."""
    from lora_ft.sections import DataSection, SourceSection

    return DataSection((SourceSection(str(path)),), max_length=2048, cache_dir=str(cache))


def run_ours(path: Path, tokenizer: Any) -> None:
    """From the file to rows on disk, into an empty cache."""
    from lora_ft.data.prepare import build_splits

    with tempfile.TemporaryDirectory() as cache:
        build_splits(make_section(path, Path(cache)), tokenizer)


def run_trl(rows: Any, tokenizer: Any) -> None:
    """TRL's own preparation with assistant-only labels, on a data set in memory."""
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, max_length=2048, assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False)
        trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
        SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")


def time_turns(systems: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """The median seconds of each system; all take a turn in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(runs):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


# --- the figures ------------------------------------------------------------------------------------------------


def measure_speed(folder: Path, count: int, runs: int) -> Iterator[Figure]:
    """Rows per second: ours, TRL's, and one batched call of the tokenizer on rendered text."""
    import datasets

    from lora_ft.data.prepare import build_splits

    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer(folder)
    path = write_rows(folder / "rows.jsonl", count)
    rows = datasets.Dataset.from_generator(make_rows, gen_kwargs={"count": count}, cache_dir=str(folder / "hf"))
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in make_rows(count)]
    systems: dict[str, Callable[[], object]] = {
        "ours": lambda: run_ours(path, tokenizer),
        "trl": lambda: run_trl(rows, tokenizer),
        "tokenizer": lambda: tokenizer(texts, add_special_tokens=False),
    }
    seconds = time_turns(systems, runs)
    build_splits(make_section(path, folder / "cache"), tokenizer)
    again = time_turns({"again": lambda: build_splits(make_section(path, folder / "cache"), tokenizer)}, runs)
    yield Figure("preparing, ours", count / seconds["ours"], "rows/s", "")
    yield Figure("preparing, TRL", count / seconds["trl"], "rows/s", "")
    yield Figure("one batched tokenizer call", count / seconds["tokenizer"], "rows/s", "")
    yield Figure("ours / TRL", seconds["trl"] / seconds["ours"], "×", "≥ 4")
    yield Figure("ours / tokenizer call", seconds["tokenizer"] / seconds["ours"], "×", "≥ 0.8")
    yield Figure("preparing again", again["again"], "s", "≤ 1")


def measure_memory(folder: Path, sizes: tuple[int, int]) -> Iterator[Figure]:
    """Peak memory of a preparation, in processes of their own, at two sizes."""
    peaks = []
    for count in sizes:
        path = write_rows(folder / f"{count}.jsonl", count)
        peaks.append(run_worker("prepare", path, folder)["peak_bytes"] / 1e6)
        yield Figure(f"peak memory above imports, {count:,} rows", peaks[-1], "MB", "")
    yield Figure(f"growth from {sizes[0]:,} to {sizes[1]:,} rows", peaks[1] - peaks[0], "MB", "≤ 64 (flat)")


def measure_audit(folder: Path, count: int) -> Iterator[Figure]:
    """Seconds and memory of an audit (duplicates, near duplicates, leaks, private data)."""
    found = run_worker("audit", write_rows(folder / "audit.jsonl", count), folder)
    yield Figure(f"auditing {count:,} rows", found["seconds"], "s", f"≤ {60 * count / 100_000:.0f}")
    yield Figure("peak memory of the audit", found["peak_bytes"] / 1e6, "MB", "")


def measure_packing(folder: Path, count: int) -> Iterator[Figure]:
    """Share of token slots that packed rows of 2,048 use."""
    from dataclasses import replace

    from lora_ft.data.prepare import build_splits

    tokenizer = load_tokenizer(folder)
    section = replace(make_section(write_rows(folder / "pack.jsonl", count), folder / "cache"), packing=True)
    share = build_splits(section, tokenizer).report.splits["train"].packed_share
    yield Figure("token slots used after packing", 100 * (share or 0), "%", "≥ 98")


# --- a process of its own ---------------------------------------------------------------------------------------


def run_worker(task: str, path: Path, folder: Path) -> dict[str, float]:
    """What a fresh process measured while it did `task`."""
    command = [sys.executable, __file__, "--worker", task, str(path), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(task: str, path: Path, folder: Path) -> dict[str, float]:
    """Does `task` and measures it, after all imports."""
    import datasets  # noqa: F401

    from lora_ft.data.audit import audit_splits
    from lora_ft.data.prepare import build_splits

    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as cache:
        section = make_section(path, Path(cache))
        if task == "prepare":
            return measure(lambda: build_splits(section, tokenizer))
        splits = build_splits(section, tokenizer)
        return measure(lambda: audit_splits(splits, section, tokenizer))


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Seconds, and the peak of memory above what is held now, looked at 50 times a second."""
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak_bytes": max(0, peak[0] - before)}


def resident_bytes() -> int:
    """Memory of this process: all that is resident, mapped files included."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_figures(figures: list[Figure]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "measured", "target", title="Data")
    for figure in figures:
        number = f"{figure.value:,.3g}" if figure.value < 1000 else f"{figure.value:,.0f}"
        table.add_row(figure.name, f"{number} {figure.unit}", figure.target)
    Console().print(table)


def main() -> None:
    """All figures, or those named by --only; one measured run with --worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "packing", "memory", "audit"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("TASK", "FILE"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker[0], Path(options.worker[1]), options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder)
        parts: dict[str, Iterator[Figure]] = {
            "speed": measure_speed(folder, options.rows, options.runs),
            "packing": measure_packing(folder, options.rows),
            "memory": measure_memory(folder, (options.rows, 10 * options.rows)),
            "audit": measure_audit(folder, 5 * options.rows),
        }
        figures = [figure for part, found in parts.items() if options.only in (None, part) for figure in found]
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures]))
    else:
        print_figures(figures)


if __name__ == "__main__":
    main()
