"""Dealt rows become documents on disk, and documents packed rows; everything that is left out is counted."""

from __future__ import annotations

import gc
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
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

Item = TypeVar("Item")
Result = TypeVar("Result")


def write_documents(
    path: Path, examples: StoredExamples, task: Task, faults: FaultList
) -> tuple[SplitReport, np.ndarray]:
    """The documents of one split, written to `path`; with the counts, and which example each document came from."""
    counts: Counter[str] = Counter(num_rows=len(examples))
    numbers = array("q")
    with ArrowWriter(path, pa.schema({"input_ids": TOKENS, "labels": task.label_type})) as writer:
        number = 0
        for found in map_ahead(task.fit, chunked(examples)):
            documents: list[Document] = []
            for kept in count_losses(found, faults, counts):
                documents += kept
                numbers.extend([number] * len(kept))
                number += 1
            labels = [document.labels for document in documents]
            is_class = not pa.types.is_list(task.label_type)
            writer.write([d.input_ids for d in documents], [label for (label,) in labels] if is_class else labels)
            counts["num_documents"] += len(documents)
            counts["num_tokens"] += sum(len(document.input_ids) for document in documents)
            counts["num_supervised_tokens"] += sum(document.num_supervised_tokens for document in documents)
    return SplitReport(**counts), np.array(numbers)


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


def count_losses(
    found: Iterable[Fitted | Fault], faults: FaultList, counts: Counter[str]
) -> Iterator[tuple[Document, ...]]:
    """The documents of each row that hold a supervised token; what is lost is counted."""
    for fitted in found:
        if isinstance(fitted, Fault):
            faults.add(fitted)
            counts["num_dropped_refused"] += 1
            yield ()
            continue
        kept = tuple(document for document in fitted.documents if document.num_supervised_tokens)
        counts["num_dropped_too_long"] += not fitted.documents
        counts["num_dropped_unsupervised"] += bool(fitted.documents) and not kept
        counts["num_truncated"] += bool(kept) and fitted.is_truncated
        counts["num_answers_cut"] += bool(kept) and fitted.is_answer_cut
        yield kept


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
