"""Rows that say nearly the same, found without comparing every row with every other.

A row is the set of its runs of three words. Two rows are near duplicates when their sets share most of their elements
(Jaccard index). MinHash gives such rows equal signatures with high probability; rows that agree in a band of the
signature are looked up and compared for real, so that what is reported is true; one in twenty at the threshold, fewer
above it, is missed.

    shingles   {the battery is, battery is full}          J = shared / all
    signature  16 bands of 8 minima                       P(found) = 1 - (1 - J^8)^16:   J 0.8: 0.95   0.9: 0.9999

Signatures lie in a file, band after band: memory is 16 bytes a row while one band is sorted, 160 MB for ten million.
Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec et al., Mining of Massive Datasets, 3.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

NUM_BANDS, BAND_SIZE = 16, 8
RUN_WORDS = 3
THRESHOLD = 0.8
"""Jaccard index from which two rows count as near duplicates."""
MAX_WORDS = 100_000
"""Words whose hashes are kept, in about 12 MB."""
CACHED_ROWS = 64
"""Rows whose runs are kept: the first row of a bucket is compared with all others in it."""

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(f"[{_ALONE}]|[^\\W{_ALONE}]+").findall
"""Words; in scripts that write no spaces, each character."""
_ASCII = "".join(chr(code).lower() if chr(code).isidentifier() or chr(code).isdigit() else " " for code in range(128))
"""What `str.translate` makes of ASCII, so that its words are what `str.split` gives: twice as quick as the pattern."""
_RANDOM = np.random.default_rng(20240726)
_FACTORS = _RANDOM.integers(1, 1 << 32, (NUM_BANDS * BAND_SIZE, 1), dtype=np.uint32) | np.uint32(1)
_MIXERS = _RANDOM.integers(1, 1 << 63, max(RUN_WORDS, BAND_SIZE), dtype=np.uint64) | np.uint64(1)


class WordHashes(dict[str, int]):
    """Word → its hash, for the words that were met lately: most words of a text are common ones."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_WORDS:
            self.clear()
        self[word] = found = zlib.crc32(word.encode())
        return found


_HASHES = WordHashes()


def hash_runs(text: str) -> np.ndarray:
    """Hashes of the runs of three words in a text (of all words where there are fewer), uint64."""
    found = (text.translate(_ASCII).split() if text.isascii() else _WORDS(text.casefold())) or [""]
    words = np.fromiter(map(_HASHES.__getitem__, found), np.int64, len(found)).view(np.uint64)
    mixed = np.correlate(words, _MIXERS[: min(RUN_WORDS, len(words))], "valid")
    return mixed ^ (mixed >> np.uint64(29))


def find_runs(text: str) -> np.ndarray:
    """The runs of a text as a sorted set of their hashes, uint64."""
    return np.unique(hash_runs(text))


def sign_bands(runs: np.ndarray) -> np.ndarray:
    """One number a band for a set of runs, uint32 [NUM_BANDS]: equal in two rows where all minima of the band are."""
    short = (runs >> np.uint64(32)).astype(np.uint32)
    minima = (_FACTORS * short).min(axis=1).reshape(NUM_BANDS, BAND_SIZE)
    mixed = (minima * _MIXERS[:BAND_SIZE]).sum(axis=1, dtype=np.uint64)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def find_near_duplicates(texts: Iterable[str], num_rows: int, read: Callable[[int], str]) -> np.ndarray:
    """For every row the first row that is nearly the same, itself where there is none; int64 [num_rows].

    `texts` are all rows in order; `read` gives the text of one row again, for the comparison.
    """
    first = array("q", range(num_rows))
    read_runs = lru_cache(maxsize=CACHED_ROWS)(lambda row: find_runs(read(row)))
    with TemporaryDirectory() as folder:
        file = np.memmap(Path(folder) / "bands", dtype=np.uint32, mode="w+", shape=(NUM_BANDS, max(num_rows, 1)))
        bands = np.asarray(file)  # a memmap would make a memmap of every slice, one a row
        for row, text in enumerate(texts):
            bands[:, row] = sign_bands(hash_runs(text))
        for band in bands:
            for left, right in _candidates(band[:num_rows]):
                if _root(first, left) != _root(first, right) and share_runs(read_runs(left), read_runs(right)):
                    roots = sorted((_root(first, left), _root(first, right)))
                    first[roots[1]] = roots[0]
        del bands, file
    for row in range(num_rows):
        first[row] = _root(first, row)
    return np.asarray(first)


def share_runs(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two sets of runs have at least THRESHOLD of their elements in common."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared >= THRESHOLD * (len(left) + len(right) - shared)


def _candidates(band: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows with equal numbers in a band: each row with the first of its bucket, and with the one before it."""
    order = np.argsort(band, kind="stable")
    values = band[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    sizes = np.diff(np.r_[starts, len(values)])
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        bucket = order[start : start + size].tolist()
        for before, row in pairwise(bucket):
            yield bucket[0], row
            yield before, row


def _root(first: array[int], row: int) -> int:
    while first[row] != row:
        first[row] = row = first[first[row]]
    return row
