"""What became of every row, in numbers that add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SplitReport:
    """One split. `num_rows` rows were dealt to it; those dropped left, those split made more."""

    num_rows: int = 0
    """Rows dealt to the split, repeats by weight included."""
    num_documents: int = 0
    """Documents it holds."""
    num_dropped_too_long: int = 0
    """Rows longer than `max_length` that were left out."""
    num_dropped_unsupervised: int = 0
    """Rows left out because they hold no supervised token (any more)."""
    num_dropped_refused: int = 0
    """Rows left out because the chat template does not take them."""
    num_truncated: int = 0
    """Rows that lost tokens."""
    num_answers_cut: int = 0
    """Rows that end inside an answer, which lost its terminator."""
    num_tokens: int = 0
    """Tokens of all documents."""
    num_supervised_tokens: int = 0
    """Tokens that give a loss."""
    num_packed_rows: int | None = None
    """Rows after packing; None where nothing is packed."""
    packed_share: float | None = None
    """Share of token slots of the packed rows that hold tokens."""
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The first rows of each loss, by the name of its count."""


@dataclass(frozen=True)
class DataReport:
    """The way of all rows: `num_read = num_kept + num_skipped + num_left_out_weight + num_left_out_balance`."""

    num_read: int
    """Rows the sources gave, bad ones included."""
    num_kept: int
    """Rows dealt to a split (each once, whatever its weight)."""
    num_skipped: int
    """Bad rows."""
    num_left_out_weight: int
    """Rows left out by a source's weight below 1."""
    num_left_out_balance: int
    """Rows left out to make labels equally frequent."""
    splits: Mapping[str, SplitReport]
    """The splits by name."""
    redacted: Mapping[str, int] = field(default_factory=dict)
    """Stretches of private data that were masked, by kind."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers."""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Rows by the format they were read in."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Rows that hold something in a column that their format does not read, by column."""
    faults: tuple[str, ...] = ()
    """The first bad rows, as messages."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataReport:
        """The report that `to_json` wrote."""
        splits = {name: SplitReport(**counts) for name, counts in value["splits"].items()}
        lists = {name: tuple(value[name]) for name in ("labels", "faults")}
        return cls(**{**value, **lists, "splits": splits})
