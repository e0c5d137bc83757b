"""Dealt rows become documents on disk, and documents packed rows; everything that is left out is counted."""

from __future__ import annotations

import gc
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from lora_ft.data.fitting import Fitted
from lora_ft.data.ingest import FaultList
from lora_ft.data.packing import plan_rows
from lora_ft.data.render import Document
from lora_ft.data.report import SplitReport
from lora_ft.data.store import TOKENS, ArrowWriter, StoredExamples, TokenRows, chunked
from lora_ft.data.tasks import Task
from lora_ft.errors import Fault

MAX_PLACES = 3
"""Rows that are named for each loss."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Tally:
    """What was counted in one split, and the first rows of each loss."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first_rows: dict[str, list[int]] = {}

    def add_losses(self, fitted: Fitted, kept: Sequence[Document], row: int) -> None:
        """What one row lost, if anything."""
        losses = {
            "num_dropped_too_long": not fitted.documents,
            "num_dropped_unsupervised": bool(fitted.documents) and not kept,
            "num_truncated": bool(kept) and fitted.is_truncated,
            "num_answers_cut": bool(kept) and fitted.is_answer_cut,
        }
        for name, is_lost in losses.items():
            if is_lost:
                self.counts[name] += 1
                if len(rows := self.first_rows.setdefault(name, [])) < MAX_PLACES:
                    rows.append(row)

    def add_documents(self, documents: Sequence[Document]) -> None:
        """Documents that are kept."""
        self.counts["num_documents"] += len(documents)
        self.counts["num_tokens"] += sum(len(document.input_ids) for document in documents)
        self.counts["num_supervised_tokens"] += sum(document.num_supervised_tokens for document in documents)

    def report(self, examples: StoredExamples) -> SplitReport:
        """The counts of a split that was dealt `examples`."""
        places = {name: tuple(examples[row].place for row in rows) for name, rows in self.first_rows.items()}
        return SplitReport(num_rows=len(examples), places=places, **self.counts)


def write_documents(
    path: Path, examples: StoredExamples, task: Task, faults: FaultList
) -> tuple[SplitReport, np.ndarray]:
    """The documents of one split, written to `path`; with the counts, and which example each document came from."""
    tally, origins, row = Tally(), array("q"), 0
    with ArrowWriter(path, pa.schema({"input_ids": TOKENS, "labels": task.label_type})) as writer:
        for found in map_ahead(task.fit, chunked(examples)):
            documents: list[Document] = []
            for fitted in found:
                kept = keep_supervised(fitted, row, faults, tally)
                documents += kept
                origins.extend([row] * len(kept))
                row += 1
            labels = [document.labels for document in documents]
            is_class = not pa.types.is_list(task.label_type)
            writer.write([d.input_ids for d in documents], [label for (label,) in labels] if is_class else labels)
            tally.add_documents(documents)
    return tally.report(examples), np.array(origins)


def keep_supervised(fitted: Fitted | Fault, row: int, faults: FaultList, tally: Tally) -> list[Document]:
    """A row's documents that hold a supervised token; what is lost is counted."""
    if isinstance(fitted, Fault):
        faults.add(fitted)
        tally.counts["num_dropped_refused"] += 1
        return []
    kept = [document for document in fitted.documents if document.num_supervised_tokens]
    if len(kept) != 1 or fitted.is_truncated:
        tally.add_losses(fitted, kept, row)
    return kept


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Python's search for reference cycles, made rare: token lists have none, and it reads all of them each time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The function's results in order, the next two under way in threads.

    The tokenizer works outside of Python's lock: while it has one chunk, the next is cut, and the last one written.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def pack_file(source: Path, target: Path, row_length: int) -> tuple[int, float]:
    """The documents of `source` packed into rows in `target`; the number of rows, and the share of slots they fill."""
    documents = TokenRows(source)
    lengths = documents.document_lengths()
    plan = plan_rows(lengths, row_length)
    columns = ("input_ids", "labels", "seq_lengths")
    with ArrowWriter(target, pa.schema(dict.fromkeys(columns, TOKENS))) as writer:
        for chunk in chunked(plan):
            rows = [[documents.read_lists(number) for number in row] for row in chunk]
            joined = [[np.concatenate([lists[i] for lists in row]) for row in rows] for i in range(2)]
            writer.write(*joined, [lengths[row] for row in chunk])
    return len(plan), float(lengths.sum() / (len(plan) * row_length)) if len(plan) else 1.0
