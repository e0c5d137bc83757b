"""What preparing, auditing and packing data costs: against TRL, against the tokenizer alone, and as the data grows.

Ours is timed from a JSONL file to rows on disk, synced; TRL's `_prepare_dataset` from a data set in memory, which gives
it a head start. Systems take turns in each round; medians count, and their ratios are what to compare across machines.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.figure import Figure, Options, measure_call, run_worker, seconds_of, take_turns

ROWS = 20_000
"""Conversations that are prepared; ten times as many for memory, five times for the audit."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def find_texts(data: Path) -> list[tuple[str, str]]:
    """Questions and answers of GSM8K."""
    rows = json.loads((data / "gsm8k_train.json").read_bytes())
    return [(row["instruction"], row["output"]) for row in rows]


def make_rows(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """Conversations of two questions and two answers, each with a number of its own."""
    texts = find_texts(data)
    for number in range(count):
        (first, one), (second, two) = texts[number % len(texts)], texts[(7 * number + 3) % len(texts)]
        turns = [("user", f"({number}) {first}"), ("assistant", one), ("user", second), ("assistant", two)]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_rows(path: Path, data: Path, count: int) -> Path:
    """The rows as a JSONL file."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in make_rows(data, count))
    return path


def make_tokenizer(folder: Path, data: Path) -> None:
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
    core.train_from_iterator((text for pair in find_texts(data) for text in pair), trainer)
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


# --- the figures ------------------------------------------------------------------------------------------------


def measure(options: Options) -> Iterator[Figure]:
    """Speed, packing, memory and audit, one after the other."""
    folder = options.scratch / "data"
    folder.mkdir()
    make_tokenizer(folder, options.data)
    yield from measure_speed(folder, options)
    yield from measure_packing(folder, options)
    yield from measure_memory(folder, options)
    yield from measure_audit(folder, options)


def measure_speed(folder: Path, options: Options) -> Iterator[Figure]:
    """Rows per second: ours, TRL's, and one batched call of the tokenizer on rendered text."""
    import datasets

    from lora_ft.data.prepare import build_splits

    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer(folder)
    path = write_rows(folder / "rows.jsonl", options.data, ROWS)
    rows = datasets.Dataset.from_generator(
        make_rows, gen_kwargs={"data": options.data, "count": ROWS}, cache_dir=str(folder / "hf")
    )
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in make_rows(options.data, ROWS)]
    systems: dict[str, Callable[[], object]] = {
        "ours": lambda: run_ours(path, tokenizer),
        "TRL": lambda: run_trl(rows, tokenizer),
        "one batched tokenizer call": lambda: tokenizer(texts, add_special_tokens=False),
    }
    seconds = take_turns({name: timer(run) for name, run in systems.items()}, options.rounds)
    build_splits(make_section(path, folder / "cache"), tokenizer)
    again = timer(lambda: build_splits(make_section(path, folder / "cache"), tokenizer))
    for name, value in seconds.items():
        yield Figure("data", f"preparing {ROWS:,} conversations: {name}", ROWS / value, "rows/s")
    yield Figure("data", "ours / TRL", seconds["TRL"] / seconds["ours"], "×", at_least=4)
    share = seconds["one batched tokenizer call"] / seconds["ours"]
    yield Figure("data", "ours / one batched tokenizer call", share, "×", at_least=0.8)
    yield Figure("data", "preparing again", take_turns({"again": again}, options.rounds)["again"], "s", at_most=1)


def timer(run: Callable[[], object]) -> Callable[[], float]:
    """Seconds of a call, each time it is made."""
    return lambda: seconds_of(run)


def measure_memory(folder: Path, options: Options) -> Iterator[Figure]:
    """Peak memory of a preparation, in processes of their own, at two sizes."""
    peaks = []
    for count in (ROWS, 10 * ROWS):
        path = write_rows(folder / f"{count}.jsonl", options.data, count)
        peaks.append(run_worker("data", "prepare", path, folder)["peak_bytes"] / 1e6)
        yield Figure("data", f"peak memory above imports, {count:,} rows", peaks[-1], "MB")
    yield Figure("data", "growth with ten times the rows", peaks[1] - peaks[0], "MB", at_most=64)


def measure_audit(folder: Path, options: Options) -> Iterator[Figure]:
    """Seconds and memory of an audit (duplicates, near duplicates, leaks, private data)."""
    count = 5 * ROWS
    found = run_worker("data", "audit", write_rows(folder / "audit.jsonl", options.data, count), folder)
    yield Figure("data", f"auditing {count:,} rows", found["seconds"], "s", at_most=60)
    yield Figure("data", "peak memory of the audit above imports", found["peak_bytes"] / 1e6, "MB")


def measure_packing(folder: Path, options: Options) -> Iterator[Figure]:
    """Share of token slots that packed rows of 2,048 use."""
    from dataclasses import replace

    from lora_ft.data.prepare import build_splits

    tokenizer = load_tokenizer(folder)
    path = write_rows(folder / "pack.jsonl", options.data, ROWS)
    section = replace(make_section(path, folder / "cache"), packing=True)
    share = build_splits(section, tokenizer).report.splits["train"].packed_share
    yield Figure("data", "token slots used after packing", 100 * (share or 0), "%", at_least=98)


def work(task: str, path: str, folder: str) -> dict[str, float]:
    """`prepare` or `audit` in this process, after all imports."""
    import datasets  # noqa: F401

    from lora_ft.data.audit import audit_splits
    from lora_ft.data.prepare import build_splits

    tokenizer = load_tokenizer(Path(folder))
    with tempfile.TemporaryDirectory() as cache:
        section = make_section(Path(path), Path(cache))
        if task == "prepare":
            return measure_call(lambda: build_splits(section, tokenizer))
        splits = build_splits(section, tokenizer)
        return measure_call(lambda: audit_splits(splits, section, tokenizer))
