"""Tokenised splits on disk, as everything after the data floor takes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_ft.data.report import DataReport
from lora_ft.data.split import SPLITS, RowIndex
from lora_ft.data.store import ExampleFile, StoredExamples, TokenRows

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES, INDEX, REPORT = "examples.arrow", "index.npz", "report.json"
"""Files of a prepared folder, beside a token file and a list of row numbers for each split."""


@dataclass(frozen=True)
class Splits:
    """Tokenised data, mapped from disk."""

    train: Dataset
    """Columns input_ids, labels; packed rows also seq_lengths."""
    validation: Dataset
    """Like `train`."""
    test: Dataset
    """Columns input_ids, labels; never packed."""
    report: DataReport
    """What became of every row."""
    fingerprint: str
    """Hash of all that went in: rows, tokenizer, template, options."""
    folder: Path
    """Where the files lie."""

    def examples(self, split: str) -> StoredExamples:
        """The split's rows before rendering, in the order of its unpacked rows."""
        return StoredExamples(ExampleFile(self.folder / EXAMPLES), np.load(self.folder / f"{split}.npy"))

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, in whatever split."""
        return max(int(TokenRows(self.folder / f"{split}.arrow").row_lengths().max(initial=0)) for split in SPLITS)

    @property
    def largest_token(self) -> int:
        """The largest token id of all rows, answers that a decoder writes among them; all of them are read."""
        return max(TokenRows(self.folder / f"{split}.arrow").largest_token() for split in SPLITS)

    def load_index(self) -> tuple[RowIndex, np.ndarray]:
        """What the deal knew of every row, and the split each row got (negative: none)."""
        with np.load(self.folder / INDEX) as arrays:
            dealt = arrays["dealt"]
            return RowIndex(**{name: arrays[name] for name in arrays if name != "dealt"}), dealt


def load_splits(folder: Path, fingerprint: str) -> Splits:
    """The splits in a prepared folder."""
    from datasets import Dataset

    report = DataReport.from_json(json.loads((folder / REPORT).read_bytes()))
    rows = {split: Dataset.from_file(str(folder / f"{split}.arrow")) for split in SPLITS}
    return Splits(**rows, report=report, fingerprint=fingerprint, folder=folder)
