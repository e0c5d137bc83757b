"""The sections of a recipe that are ours, as frozen dataclasses; each field is documented right under it.

`quantization`, `lora` and `training` are not here: they are the installed libraries' own fields, verbatim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Task = Literal["sft", "classification", "seq2seq"]
Split = Literal["train", "validation", "test"]
DEFAULT_TARGET_LENGTH = 128
"""Tokens of an answer that a decoder writes, where nobody says otherwise."""


@dataclass(frozen=True)
class ModelSection:
    """Which base, and how it is read."""

    base: str
    """Hub id (`Qwen/Qwen3-8B`), a folder, or `builtin:NAME`."""
    revision: str | None = None
    """Commit, tag or branch of a Hub base; the commit it stood for is recorded with the run."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights that are not quantised and of the arithmetic; `auto` measures what this machine does fastest."""
    attn_implementation: str | None = None
    """transformers' name of an attention (`sdpa`, `eager`, `flash_attention_2`, …); chosen if null."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside the base may run. Read that code first."""
    adapter: str | None = None
    """Folder of an adapter to go on training; its own LoRA settings are kept, so `lora` must be left out."""


@dataclass(frozen=True)
class SourceSection:
    """One place rows come from."""

    path: str
    """File, folder, glob, `builtin:NAME/FILE`, or Hub data set id."""
    format: str = "auto"
    """Name of a row format, or `auto` to find it from the columns."""
    split: Split | None = None
    """The split all its rows belong to; if null, `data.split` deals them out."""
    weight: float = 1.0
    """How often the source is drawn, relative to the others; 0.5 takes half its rows, 2 takes each twice."""
    columns: dict[str, str] = field(default_factory=dict)
    """Field of the format → column of the file, where the names differ."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    hub_split: str = "train"
    """Split of a Hub data set that is read."""


@dataclass(frozen=True)
class SplitSection:
    """How rows without a split of their own are dealt out, before anything else happens to them."""

    validation: float = 0.1
    """Share of rows that steers training, between 0 and 1."""
    test: float = 0.1
    """Share of rows nobody trains on or steers by, between 0 and 1."""
    seed: int = 42
    """Seed of the deal."""


@dataclass(frozen=True)
class DataSection:
    """Rows, and how they become tokens and labels."""

    sources: tuple[SourceSection, ...]
    """Where rows come from, in order."""
    task: Task = "sft"
    """What is learned: text (`sft`), a label (`classification`), or an answer from an encoder (`seq2seq`)."""
    split: SplitSection = field(default_factory=SplitSection)
    """How rows are dealt out to train, validation and test."""
    max_length: int = 1024
    """Longest row in tokens."""
    max_target_length: int | None = None
    """Longest answer in tokens where an encoder reads the question (`seq2seq`); 128 if null."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are supervised: all answers, only the last answer, or every token."""
    truncation: Literal["keep_start", "keep_end", "context", "split", "drop"] = "keep_start"
    """What happens to a row longer than `max_length`: its start or end is kept, its `context` column is shortened, a
    plain text goes on in the next row (`split`; other rows are refused), or it is left out; always counted."""
    packing: bool = False
    """Whether whole documents share rows of `max_length` tokens, without seeing each other."""
    balance: bool = False
    """Whether labels are made equally frequent, by leaving out rows of the frequent ones at random."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Whether a row that fits no format ends the command or is counted and left out."""
    redact: bool = False
    """Whether personal data and secrets are masked (`[EMAIL]`, `[CARD]` …) before anything else sees the rows."""
    strict: bool = False
    """Whether warnings of the audit (truncated answers, leaks) end the command."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as `enable_thinking: false`."""
    cache_dir: str | None = None
    """Folder where prepared data is kept between runs; `$LORA_FT_CACHE`, or `~/.cache/lora_ft`, if null."""


@dataclass(frozen=True)
class EvaluationSection:
    """What is measured on the test split, for base and tuned model alike."""

    generate: int | Literal["all"] = 32
    """How many test rows are answered by generation (the first that ask something); 0 for none, `all` for every one."""
    metrics: tuple[str, ...] = ("exact_match",)
    """Metrics over the generated answers: names, or functions (answer, reference) → number as `FILE.py:FUNCTION`."""
    general: str | None = "builtin:general/text.jsonl"
    """Text that has nothing to do with the task, to see what was forgotten: a file as in `data.sources`, or null."""
    max_new_tokens: int = 128
    """Longest generated answer in tokens."""
    batch_size: int = 16
    """Test rows per forward pass."""


@dataclass(frozen=True)
class GuardsSection:
    """What ends training before its time, and what only makes itself heard."""

    skip_non_finite: int = 0
    """How many steps may be left out of a run because their loss or gradient is not finite; the next one ends it."""
    stall_minutes: float = 15.0
    """After how long without any movement every rank says where it stands and what it waits for; 0 for never."""


@dataclass(frozen=True)
class ExportSection:
    """What is made of the adapter after training."""

    merge: bool = False
    """Whether base and adapter are merged into `merged/`."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the merged weights; that of the base's files if null."""
    push_to: str | None = None
    """Hub repository the adapter is published to."""


@dataclass(frozen=True)
class Choice:
    """A setting the recipe left open, and why it got its value on this machine."""

    key: str
    """`section.key`, as one would write it on the command line."""
    value: object
    """What was chosen."""
    reason: str
    """Why, in a few words."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs to know."""

    output_dir: Path
    """Folder of the run."""
    model: ModelSection
    """The base."""
    data: DataSection
    """The rows."""
    quantization: dict[str, Any] | None = None
    """Fields of `transformers.BitsAndBytesConfig`; None for 16 or 32 bit."""
    lora: dict[str, Any] | None = None
    """Fields of `peft.LoraConfig`; None when an existing adapter goes on training."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `trl.SFTConfig`."""
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    """What is measured."""
    guards: GuardsSection = field(default_factory=GuardsSection)
    """What ends training early."""
    export: ExportSection = field(default_factory=ExportSection)
    """What is made of the adapter."""
    choices: tuple[Choice, ...] = ()
    """What was chosen for the machine, in order."""
