"""What a person should know about the data before training on it, counted and judged.

Rows are read one by one from disk. What stays in memory is 16 bytes a row (hashes) and, while near duplicates are
looked for, some 30 more: half a gigabyte for ten million rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_ft.data.duplicates import THRESHOLD, find_near_duplicates
from lora_ft.data.example import Example
from lora_ft.data.packing import plan_rows
from lora_ft.data.privacy import SECRETS, find_private
from lora_ft.data.report import DataReport
from lora_ft.data.split import SPLITS, TRAIN, group_rows
from lora_ft.data.splits import EXAMPLES, Splits
from lora_ft.data.store import ExampleFile, StoredExamples, TokenRows
from lora_ft.data.template import any_of
from lora_ft.errors import Fault, raise_faults
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Verdict = Literal["ok", "note", "warning"]
MAX_PLACES = 3
NUM_BINS = 12
BATCH_ROWS = 8
"""Rows of the batch by which the cost of padding is told."""
UNEVEN = 3.0
"""A label this many times as frequent as another is worth a note."""

JOINTS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")
"""What joins two words."""
ODDITIES: dict[str, re.Pattern[str]] = {
    "mojibake": re.compile("Ã[\x80-\xbf]|â€|Â[\xa0-\xbf]"),
    "lost characters": re.compile("\ufffd"),
    "control characters": re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]"),
}
"""Marks of text that went through a wrong hand."""
TEXT_CHECKS: dict[str, tuple[Verdict, str]] = {
    "rows with secrets": ("warning", "A model gives them out again. Mask them: data.redact: true. Found: {kinds}."),
    "rows with personal data": ("note", "A model gives it out again. Mask it: data.redact: true. Found: {kinds}."),
    "rows that spell special tokens": ("note", "The model reads them as the borders of turns. Rewrite them."),
    "answers that repeat the question": ("note", "They teach to echo."),
    "mojibake": ("note", "UTF-8 was read as Latin-1 somewhere. Convert the file again from its source."),
    "lost characters": ("note", "U+FFFD stands for what a wrong encoding lost."),
    "control characters": ("note", "They seldom belong in text."),
}
"""What is looked for in the text of rows, with what it means."""
LEAKS = ("held-out questions asked in training too", "held-out rows much like training rows")
"""Names of the checks for rows that stand on both sides of the test."""
FIRST_LETTER = re.compile(r"[^\W\d_]").search


@dataclass(frozen=True)
class Check:
    """One thing that was looked for."""

    name: str
    """What, in a few words."""
    count: int
    """How often it was found."""
    verdict: Verdict
    """`ok` where nothing is wrong; a `warning` ends the command under `data.strict`."""
    meaning: str
    """Why it matters, and what to do."""
    places: tuple[str, ...] = ()
    """The first rows it was found in."""


@dataclass(frozen=True)
class Lengths:
    """How long the documents of a split are, in tokens."""

    shortest: int
    """Of the shortest document."""
    median: int
    """Half of the documents are no longer."""
    longest: int
    """Of the longest document."""
    histogram: tuple[int, ...]
    """Documents in each of 12 bins of equal width from 0 to `longest`."""
    padded_share: float
    """Share of token slots that padding takes in batches of 8 rows."""
    packed_share: float
    """Share of token slots that hold tokens when documents are packed into rows of `max_length`."""


@dataclass(frozen=True)
class AuditReport:
    """All that was counted and found."""

    data: DataReport
    """What became of every row."""
    lengths: Mapping[str, Lengths]
    """Lengths of the splits that hold documents of tokens."""
    labels: Mapping[str, int]
    """Rows of each class."""
    scripts: Mapping[str, int]
    """Rows by the script they begin in."""
    checks: tuple[Check, ...]
    """What was looked for, in order of weight."""
    is_strict: bool = False
    """Whether warnings end a training."""

    @property
    def warnings(self) -> tuple[Check, ...]:
        """What ends the command under `strict`."""
        return tuple(check for check in self.checks if check.verdict == "warning")

    def refuse_warnings(self) -> None:
        """Nothing when there is no warning; otherwise an error that names each."""
        raise_faults(
            Fault(", ".join(check.places) or "data", f"{check.count} {check.name}", check.meaning, "(data.strict)")
            for check in self.warnings
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return asdict(self)


def audit_splits(splits: Splits, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> AuditReport:
    """The audit of prepared data."""
    lengths = {name: measure_lengths(splits, name, section) for name in SPLITS}
    index, dealt = splits.load_index()
    labels = Counter(splits.report.labels[number] for number in index.labels[dealt >= 0] if number >= 0)
    text_checks, scripts = check_texts(splits, tokenizer)
    checks = [
        *check_losses(splits.report, section),
        *check_reading(splits.report),
        *check_copies(splits),
        *check_begin(splits, tokenizer),
        *text_checks,
        *check_labels(labels),
    ]
    weight = {"warning": 0, "note": 1, "ok": 2}
    ordered = sorted(checks, key=lambda check: weight[check.verdict])
    measured = {name: found for name, found in lengths.items() if found is not None}
    return AuditReport(splits.report, measured, dict(labels), dict(scripts), tuple(ordered), section.strict)


def judge(name: str, count: int, found: Verdict, meaning: str, places: Sequence[str] = ()) -> Check:
    """A check that is `ok` where nothing was found, and otherwise what `found` says."""
    return Check(name, count, found if count else "ok", meaning, tuple(places[:MAX_PLACES]))


def measure_lengths(splits: Splits, name: str, section: DataSection) -> Lengths | None:
    """The lengths of a split's documents; None where it holds none."""
    lengths = TokenRows(splits.folder / f"{name}.arrow").document_lengths()
    if not len(lengths):
        return None
    shuffled = np.random.default_rng(0).permutation(lengths)  # packed rows stand in order of their lengths
    batches = np.array_split(shuffled, range(BATCH_ROWS, len(lengths), BATCH_ROWS))
    num_slots = sum(int(batch.max()) * len(batch) for batch in batches)
    num_packed = len(plan_rows(lengths, section.max_length))
    bins, _ = np.histogram(lengths, NUM_BINS, (0, int(lengths.max())))
    return Lengths(
        int(lengths.min()),
        int(np.median(lengths)),
        int(lengths.max()),
        tuple(bins.tolist()),
        padded_share=1 - int(lengths.sum()) / num_slots,
        packed_share=int(lengths.sum()) / (num_packed * section.max_length),
    )


def check_losses(report: DataReport, section: DataSection) -> list[Check]:
    """Rows, answers and tokens that do not reach the model."""
    longer = f"Raise data.max_length (now {section.max_length})."
    shares = {"validation": section.split.validation, "test": section.split.test}
    num_empty = sum(1 for name, share in shares.items() if share and not report.splits[name].num_documents)

    def lost(name: str, count: str, verdict: Verdict, meaning: str) -> Check:
        number = sum(getattr(split, count) for split in report.splits.values())
        places = [place for split in report.splits.values() for place in split.places.get(count, ())]
        return judge(name, number, verdict, meaning, places)

    return [
        judge("bad rows skipped", report.num_skipped, "warning", "The report's `faults` say what is wrong with them."),
        lost("rows refused by the chat template", "num_dropped_refused", "warning", "They were left out."),
        lost("answers cut", "num_answers_cut", "warning", f"They teach the model not to stop. {longer}"),
        lost("rows too long", "num_dropped_too_long", "warning", f"They were left out. {longer}"),
        lost("rows without a supervised token", "num_dropped_unsupervised", "warning", f"Left out. {longer}"),
        lost("rows truncated", "num_truncated", "note", f"They lost tokens. {longer}"),
        judge("splits asked for and empty", num_empty, "warning", "Nothing can be measured there. Give more rows."),
    ]


def check_reading(report: DataReport) -> list[Check]:
    """What rows hold beside what is read of them, and rows that were read in more than one way."""
    formats, unread = (
        ", ".join(f"{name} ({count:,})" for name, count in counts.items()) for counts in (report.formats, report.unread)
    )
    several = len(report.formats) if len(report.formats) > 1 else 0
    return [
        judge("columns not read", len(report.unread), "note", f"No token of them is seen or learned: {unread}."),
        judge("formats of rows", several, "note", f"Is each meant to be learned? {formats}."),
    ]


def check_copies(splits: Splits) -> list[Check]:
    """Rows that stand more than once, and rows that stand on both sides of the test."""
    index, dealt = splits.load_index()
    rows = np.flatnonzero(dealt >= 0)
    examples = StoredExamples(ExampleFile(splits.folder / EXAMPLES), rows)
    keys, texts, split = group_rows(index)[rows], index.text_keys[rows], dealt[rows]
    near = find_near_duplicates((example.text for example in examples), len(rows), lambda row: examples[row].text)
    is_copy = np.ones(len(rows), dtype=bool)
    is_copy[np.unique(texts, return_index=True)[1]] = False
    is_near = (near != np.arange(len(rows))) & ~is_copy
    held_out = split != TRAIN
    is_leak = held_out & np.isin(keys, keys[~held_out])
    is_near_leak = held_out & ~is_leak & np.isin(near, near[~held_out])
    percent = f"{THRESHOLD:.0%} of their words in runs of three"

    def found(name: str, mask: np.ndarray, verdict: Verdict, meaning: str) -> Check:
        places = [examples[int(row)].place for row in np.flatnonzero(mask)[:MAX_PLACES]]
        return judge(name, int(mask.sum()), verdict, meaning, places)

    leaked = "Measured on them, memory looks like skill. Take them out of one side."
    return [
        found(LEAKS[0], is_leak, "warning", leaked),
        found(LEAKS[1], is_near_leak, "warning", f"They share {percent}. {leaked}"),
        found("copies of earlier rows", is_copy, "note", "They weigh more than others. All copies are on one side."),
        found("rows much like earlier rows", is_near, "note", f"They share {percent}."),
    ]


def check_begin(splits: Splits, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """Documents without the BOS that the tokenizer puts before plain text."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return []
    rows = TokenRows(splits.folder / "train.arrow")
    is_bare = len(rows) > 0 and int(rows.read_lists(0)[0][0]) != bos
    meaning = (
        "The chat template writes none, in training as at inference. If the model was pre-trained with one, add it."
    )
    return [judge("chat template without BOS", int(is_bare), "note", meaning)]


def check_texts(splits: Splits, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Check], Counter[str]]:
    """Private data, and text that went through a wrong hand; with the scripts that rows are written in."""
    _, dealt = splits.load_index()
    special = any_of(tokenizer.all_special_tokens)
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    scripts: Counter[str] = Counter()
    places: dict[str, list[str]] = {name: [] for name in TEXT_CHECKS}
    for example in StoredExamples(ExampleFile(splits.folder / EXAMPLES, mapped=False), np.flatnonzero(dealt >= 0)):
        text = example.text
        scripts[find_script(text)] += 1
        for name in describe_text(example, text, special, kinds):
            counts[name] += 1
            if len(places[name]) < MAX_PLACES:
                places[name].append(example.place)
    named = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return [
        judge(name, counts[name], verdict, meaning.format(kinds=named), places[name])
        for name, (verdict, meaning) in TEXT_CHECKS.items()
    ], scripts


def describe_text(example: Example, text: str, special: re.Pattern[str], kinds: Counter[str]) -> Iterator[str]:
    """The names in `TEXT_CHECKS` that hold for a row and all its text; kinds of private data are counted in `kinds`."""
    found = {finding.name for finding in find_private(text)}
    kinds.update(found)
    if found & SECRETS:
        yield "rows with secrets"
    if found - SECRETS:
        yield "rows with personal data"
    if example.messages and special.search(text):
        yield "rows that spell special tokens"
    if example.question != text and example.reference.strip() == example.question.strip():
        yield "answers that repeat the question"
    if not text.isascii() or not text.isprintable():
        yield from (name for name, pattern in ODDITIES.items() if pattern.search(text))


def find_script(text: str) -> str:
    """The script of a text's first letter, as Unicode names it: Latin, Cyrillic, CJK …"""
    letter = FIRST_LETTER(text)
    return unicodedata.name(letter.group(), "UNKNOWN").split()[0].split("-")[0].capitalize() if letter else "None"


def check_labels(labels: Mapping[str, int]) -> list[Check]:
    """Labels that are much more frequent than others, or that were probably meant to be one."""
    if len(labels) < 2:
        return []
    most, fewest = max(labels, key=labels.__getitem__), min(labels, key=labels.__getitem__)
    is_uneven = labels[most] >= UNEVEN * labels[fewest]
    share = labels[most] / sum(labels.values())
    uneven = f"Always saying {most!r} would be right in {share:.0%} of rows. Set data.balance: true."
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(_spell(label), []).append(label)
    alike = [", ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]
    two = f"They are told apart as any others. Write one where one is meant: {'; '.join(alike[:MAX_PLACES])}."
    return [
        judge("uneven labels", int(is_uneven), "note", uneven),
        judge("labels that look alike", len(alike), "warning", two),
    ]


def _spell(label: str) -> str:
    """What is left of a label that others may write in another way: `Not Spam`, `not_spam`; `1`, `01`."""
    plain = unicodedata.normalize("NFKC", label).casefold()
    return plain.lstrip("0") or "0" if plain.isdecimal() else JOINTS.sub(" ", plain)
