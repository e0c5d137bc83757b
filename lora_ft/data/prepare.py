"""From sources to tokens on disk: read, deal, render, fit, pack, count.

    sources ─► Examples (Arrow) ─► tokens and labels (Arrow) ─► a split for every row ─► its rows, packed or not (Arrow)

Of every row only a few numbers stay in memory, about 40 bytes, and some 300 at most while the rows are dealt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_ft.data.audit import AuditReport, audit_splits
from lora_ft.data.cache import build_once, find_cache, fingerprint_data
from lora_ft.data.check import check_section
from lora_ft.data.ingest import FaultList, Ingest
from lora_ft.data.render import Renderer
from lora_ft.data.report import DataReport, SplitReport
from lora_ft.data.sources import Source, find_source
from lora_ft.data.split import LEFT_OUT_BALANCE, LEFT_OUT_WEIGHT, SPLITS, TRAIN, deal_rows, repeat_rows
from lora_ft.data.splits import EXAMPLES, INDEX, REPORT, Splits, load_splits
from lora_ft.data.store import ExampleFile, StoredExamples
from lora_ft.data.tasks import build_task
from lora_ft.data.tokens import Documents, copy_documents, pack_documents, seldom_collected, write_documents
from lora_ft.errors import UserError, raise_faults
from lora_ft.fingerprint import hash_json
from lora_ft.recipe import build_options
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


DOCUMENTS = "documents.arrow"
"""The documents of all rows, until each split has its own."""


def build_splits(section: DataSection, tokenizer: PreTrainedTokenizerBase, base_folder: Path | None = None) -> Splits:
    """The data of a recipe, tokenised; taken from the cache where the same was prepared before.

    `base_folder` is what relative paths of sources are relative to.

    Raises:
        UserError: sources that are missing, rows that fit no format, nothing left to train on …; under `strict`
            everything that the audit warns of.
    """
    raise_faults(check_section(section))
    sources = [find_source(source, base_folder) for source in section.sources]
    splits = build_from(sources, section, tokenizer)
    if section.strict:
        audit_splits(splits, section, tokenizer).refuse_warnings()
    return splits


def check_data(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, base_folder: Path | None = None
) -> tuple[Splits, AuditReport]:
    """A recipe's data, prepared, and their audit, which may hold warnings that `strict` refuses."""
    splits = build_splits(replace(section, strict=False), tokenizer, base_folder)
    return splits, audit_splits(splits, section, tokenizer)


def prepare_dataset(
    rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, format: str = "auto", **options: Any
) -> Dataset:
    """A user's own rows, tokenised and labelled: columns input_ids and labels (and seq_lengths with packing=True).

    `rows` are mappings: a list, a `datasets.Dataset`, streamed or not, any iterable. `format` is a name in `FORMATS`;
    `options` are fields of `DataSection` (max_length, train_on, truncation, packing, on_bad_row …).

        rows = prepare_dataset(load_dataset("json", data_files="mine.jsonl", split="train"), tokenizer, max_length=512)

    Raises:
        UserError: an option that DataSection does not take, bad rows, or nothing left to train on.
    """
    source = {"path": "rows", "format": format, "split": "train"}
    section = build_options(DataSection, {**options, "sources": [source]}, "prepare_dataset")
    raise_faults(check_section(section))
    lasting = list(rows) if isinstance(rows, Iterator) else rows  # they are gone through twice: hashed, and read
    return build_from([Source(section.sources[0], rows=lasting)], section, tokenizer).train


def build_from(sources: Sequence[Source], section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """The splits of sources that were found."""
    fingerprint = fingerprint_data(sources, section, tokenizer)
    places = [str(path) for source in sources for path in source.files]
    folder = find_cache(section) / hash_json([fingerprint, places])[:32]
    with seldom_collected():
        build_once(folder, lambda draft: prepare_folder(draft, sources, section, tokenizer))
    return load_splits(folder, fingerprint)


def prepare_folder(
    folder: Path, sources: Sequence[Source], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Everything about the data, written to `folder`."""
    renderer, faults = Renderer(tokenizer, section), FaultList(section)
    ingest = Ingest(sources, section, renderer.is_chat, faults)
    task = build_task(section, tokenizer, renderer, ingest.class_numbers)
    chunks = ingest.read_chunks(folder / EXAMPLES)
    documents = write_documents(folder / DOCUMENTS, chunks, task, faults)
    faults.raise_refused()
    order, labels = ingest.order_classes()
    if section.balance and not labels and ingest.class_numbers:
        rule = "No row has a label, so that there is nothing to balance."
        raise UserError("data.balance", "true", rule, "Leave it out, or give rows with text and label.")
    if section.task == "classification" and len(labels) == 1:
        rule = "All rows have this label, so that there is nothing to tell apart."
        raise UserError("data.sources", labels[0], rule, "Give rows of at least two labels.")
    index = ingest.build_index(order)
    weights = np.array([source.section.weight for source in sources])
    dealt = deal_rows(index, weights, section.split, section.balance)
    np.savez(folder / INDEX, dealt=dealt, **vars(index))
    reports = {}
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(dealt == number)
        if number == TRAIN:
            seed = np.random.default_rng(section.split.seed)
            rows = repeat_rows(rows, weights[index.sources[rows]], seed)
        reports[name] = write_split(folder, name, rows, documents, section, order)
    (folder / DOCUMENTS).unlink()
    report = DataReport(
        num_read=len(dealt) + ingest.num_skipped,
        num_kept=int((dealt >= 0).sum()),
        num_skipped=ingest.num_skipped,
        num_left_out_weight=int((dealt == LEFT_OUT_WEIGHT).sum()),
        num_left_out_balance=int((dealt == LEFT_OUT_BALANCE).sum()),
        splits=reports,
        redacted=dict(ingest.redacted),
        formats=dict(ingest.usage.formats),
        unread={column: count for column, count in ingest.usage.unread.items() if count},
        labels=labels,
        faults=tuple(str(fault) for fault in faults.first),
    )
    refuse_empty(report)
    (folder / REPORT).write_text(json.dumps(report.to_json()), encoding="utf-8")


def write_split(
    folder: Path, name: str, rows: np.ndarray, documents: Documents, section: DataSection, order: np.ndarray
) -> SplitReport:
    """The split of those rows in `NAME.arrow`, packed where the recipe says so; the test split never is."""
    numbers, origins = documents.of_rows(rows)
    np.save(folder / f"{name}.npy", origins)
    report = documents.report(rows, numbers, StoredExamples(ExampleFile(folder / EXAMPLES), rows))
    path = folder / f"{name}.arrow"
    if not section.packing or name == "test":
        copy_documents(documents, numbers, path, order)
        return report
    num_packed, share = pack_documents(documents, numbers, path, section.max_length)
    return replace(report, num_packed_rows=num_packed, packed_share=share)


def refuse_empty(report: DataReport) -> None:
    """Nothing when there is something to train on."""
    train = report.splits["train"]
    if train.num_documents:
        return
    if not report.num_read:
        raise UserError("data.sources", "no rows", "The sources hold no row.", "Check the files.")
    lost = [
        f"{count} {name[4:].replace('_', ' ')}" for name, count in vars(train).items() if "dropped" in name and count
    ]
    found = f"{train.num_rows} rows dealt to train{''.join(', ' + part for part in lost)}"
    fix = "Raise data.max_length, choose another data.truncation or data.train_on, or give more rows."
    raise UserError("data", found, "No row is left that teaches anything.", fix)
