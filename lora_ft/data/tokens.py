"""Rows become documents on disk, and documents the rows of a split; everything that is left out is counted.

All rows are tokenised in the order in which they are read, whatever split they will be in: the tokenizer has work from
the first row on. A split is then a copy of its documents.
"""

from __future__ import annotations

import gc
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from lora_ft.data.example import Example
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
LOSSES = {
    "num_dropped_refused": 1,
    "num_dropped_too_long": 2,
    "num_dropped_unsupervised": 4,
    "num_truncated": 8,
    "num_answers_cut": 16,
}
"""What a row can lose, as fields of SplitReport, with the bit that says so."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Documents:
    """The documents of all rows, and what each row lost."""

    path: Path
    """Their file, in which those of one row stand behind those of the row before it."""
    losses: np.ndarray
    """Bits of LOSSES, one byte a row."""
    counts: np.ndarray
    """Documents that came of each row, uint32."""
    lengths: np.ndarray
    """Tokens of each document, int32."""
    num_supervised: np.ndarray
    """Supervised tokens of each document, int32."""

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents of some rows, and the row that each came from; int64."""
        counts = self.counts[rows].astype(np.int64)
        first = np.cumsum(self.counts, dtype=np.int64)[rows] - counts
        before = np.cumsum(counts) - counts
        return np.repeat(first - before, counts) + np.arange(counts.sum()), np.repeat(rows, counts)

    def report(self, rows: np.ndarray, numbers: np.ndarray, examples: StoredExamples) -> SplitReport:
        """The counts of a split that was dealt `rows`: `numbers` are their documents, `examples` the rows."""
        lost = {name: np.flatnonzero(self.losses[rows] & bit) for name, bit in LOSSES.items()}
        first = {name: [examples[int(row)].place for row in found[:MAX_PLACES]] for name, found in lost.items()}
        return SplitReport(
            num_rows=len(rows),
            num_documents=len(numbers),
            num_tokens=int(self.lengths[numbers].sum()),
            num_supervised_tokens=int(self.num_supervised[numbers].sum()),
            places={name: tuple(places) for name, places in first.items() if places},
            **{name: len(found) for name, found in lost.items()},
        )


def write_documents(path: Path, chunks: Iterable[Sequence[Example]], task: Task, faults: FaultList) -> Documents:
    """The documents of all rows, written to `path`; Faults of the task are added to `faults`."""
    losses, counts, lengths, num_supervised = array("B"), array("I"), array("i"), array("i")
    with ArrowWriter(path, pa.schema({"input_ids": TOKENS, "labels": task.label_type})) as writer:
        is_class = not pa.types.is_list(task.label_type)
        for found in map_ahead(task.fit, chunks):
            kept = []
            for fitted in found:
                documents = find_supervised(fitted)
                losses.append(find_losses(fitted, len(documents)))
                counts.append(len(documents))
                num_supervised.extend(count for _, count in documents)
                kept += [document for document, _ in documents]
                if isinstance(fitted, Fault):
                    faults.add(fitted)
            lengths.extend(len(document.input_ids) for document in kept)
            labels = [document.labels for document in kept]
            writer.write([d.input_ids for d in kept], [label for (label,) in labels] if is_class else labels)
    return Documents(path, *map(np.asarray, (losses, counts, lengths, num_supervised)))


def find_supervised(fitted: Fitted | Fault) -> list[tuple[Document, int]]:
    """A row's documents that hold a supervised token, and how many they hold."""
    documents = () if isinstance(fitted, Fault) else fitted.documents
    return [(document, count) for document in documents if (count := document.num_supervised_tokens)]


def find_losses(fitted: Fitted | Fault, num_kept: int) -> int:
    """Bits of LOSSES for a row of which `num_kept` documents are kept."""
    if isinstance(fitted, Fault):
        return LOSSES["num_dropped_refused"]
    if not num_kept:
        return LOSSES["num_dropped_unsupervised" if fitted.documents else "num_dropped_too_long"]
    return fitted.is_truncated * LOSSES["num_truncated"] | fitted.is_answer_cut * LOSSES["num_answers_cut"]


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


def copy_documents(documents: Documents, numbers: np.ndarray, target: Path, order: np.ndarray) -> None:
    """Documents, in rising order, as the rows of `target`; a class gets the number that `order` has for its own.

    The file is gone through once, chunk by chunk: mapped, it would count as memory, and grow with the data.
    """
    with pa.OSFile(str(documents.path)) as file:
        reader, start = pa.ipc.open_stream(file), 0
        is_class = not pa.types.is_list(reader.schema.field("labels").type)
        with ArrowWriter(target, reader.schema) as writer:
            for chunk in reader:
                first, last = np.searchsorted(numbers, (start, start + chunk.num_rows))
                taken = chunk.take(pa.array(numbers[first:last] - start))
                start += chunk.num_rows
                if is_class:
                    taken = taken.set_column(1, "labels", pa.array(order[taken.column(1).to_numpy()]))
                if taken.num_rows:
                    writer.append(taken)


def pack_documents(documents: Documents, numbers: np.ndarray, target: Path, row_length: int) -> tuple[int, float]:
    """Some documents packed into the rows of `target`; the number of rows, and the share of slots they fill."""
    tokens, lengths = TokenRows(documents.path), documents.lengths[numbers]
    plan = plan_rows(lengths, row_length)
    columns = ("input_ids", "labels", "seq_lengths")
    with ArrowWriter(target, pa.schema(dict.fromkeys(columns, TOKENS))) as writer:
        for chunk in chunked(plan):
            rows = [[tokens.read_lists(int(numbers[place])) for place in row] for row in chunk]
            joined = [[np.concatenate([lists[i] for lists in row]) for row in rows] for i in range(2)]
            writer.write(*joined, [lengths[row] for row in chunk])
    return len(plan), float(lengths.sum() / (len(plan) * row_length)) if len(plan) else 1.0
