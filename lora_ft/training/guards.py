"""Numbers that are none end training before they reach the weights; what a loss does is said in the log."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lora_ft.errors import RunFailed
from lora_ft.training.rows import find_tokens

MAX_NAMED_ROWS = 8
SPIKE_WINDOW, SPIKE_FACTOR = 20, 1.5
PLATEAU_WINDOW, PLATEAU_SHARE = 50, 0.005
SCALER_PATIENCE = 20
"""Overflows in a row that fp16's loss scale may take to find its size; it starts at 2^16 and halves each time."""


class FiniteGuard:
    """Watches the loss and the gradient of every step before the weights follow them.

    `name_row` says where the training row of a number stands; without it rows are named by their numbers.
    """

    def __init__(self, limit: int, name_row: Callable[[int], str] | None = None):
        self.num_skipped = 0
        """Steps left out so far, before a resume too."""
        self._limit, self._name_row = limit, name_row
        self._batches: list[tuple[Mapping[str, Tensor], Tensor]] = []
        self._overflows = 0

    def add_batch(self, inputs: Mapping[str, Tensor], loss: Tensor) -> None:
        """Remembers a batch of this step."""
        self._batches.append((inputs, loss))

    def find_fault(self, grad_norm: Any, *, scaled: bool) -> str | None:
        """What of this step is not finite on this rank: `loss`, `gradient`; None if all is.

        With `scaled` (fp16) the scaler leaves out overflows by itself, and only a long row of them is a fault.
        """
        losses = torch.stack([loss.detach().float() for _, loss in self._batches])
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # FSDP2's DTensor
        norm = losses.new_tensor(0.0) if grad_norm is None else torch.as_tensor(grad_norm).to(losses)
        loss_ok, norm_ok = torch.stack([losses.isfinite().all(), norm.isfinite()]).tolist()
        self._overflows = 0 if norm_ok else self._overflows + 1
        if not loss_ok:
            return "loss"
        if not norm_ok and (not scaled or self._overflows > SCALER_PATIENCE):
            return "gradient"
        return None

    def may_skip(self) -> bool:
        """Whether this step may be left out; it is counted then."""
        if self.num_skipped >= self._limit:
            return False
        self.num_skipped += 1
        return True

    def forget_step(self) -> None:
        """Ends the step: its batches are let go."""
        self._batches.clear()

    def name_rows(self, rows: Any) -> list[str]:
        """Where the rows of this step's bad batches stand, or of all its batches where only the gradient is bad."""
        bad = [batch for batch, loss in self._batches if not loss.isfinite()]
        wanted = {document for batch in bad or [b for b, _ in self._batches] for document in split_documents(batch)}
        named = [number for number, row in enumerate(rows) if _documents_of(row) <= wanted]
        packed = "seq_lengths" in (getattr(rows, "column_names", None) or ())
        if self._name_row is None or packed:
            return [f"{'packed ' if packed else ''}row {number} of the training rows" for number in named]
        return [self._name_row(number) for number in named]


def split_documents(batch: Mapping[str, Tensor]) -> Iterator[tuple[int, ...]]:
    """The token ids of every document in a batch, whether rows are padded, joined or packed."""
    ids, tokens, positions = batch["input_ids"], find_tokens(batch), batch.get("position_ids")
    for number, row in enumerate(ids):
        kept = torch.ones_like(row) if tokens is None else tokens[number]
        starts = kept.new_zeros(len(row)) if positions is None else positions[number] == 0
        document: list[int] = []
        for token, is_token, is_start in zip(row.tolist(), kept.tolist(), starts.tolist(), strict=True):
            if is_start and document:
                yield tuple(document)
                document = []
            if is_token:
                document.append(token)
        if document:
            yield tuple(document)


def _documents_of(row: Mapping[str, Any]) -> set[tuple[int, ...]]:
    ids, start, documents = row["input_ids"], 0, set()
    for length in row.get("seq_lengths") or [len(ids)]:
        documents.add(tuple(ids[start : start + length]))
        start += length
    return documents


def non_finite(step: int, what: str, places: Sequence[str], run: Path, saved: str | None) -> RunFailed:
    """The error that ends a run whose loss or gradient is not finite."""
    more = len(places) - MAX_NAMED_ROWS
    shown = ", ".join(places[:MAX_NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")
    rule = f"The {what} of this step is not finite, and weights that follow it would be none; its rows: {shown}."
    kept = f"{saved} is the last good checkpoint. " if saved else ""
    ways = "Look at these rows, lower training.learning_rate, or allow some with guards.skip_non_finite."
    fix = f"{kept}No adapter was written. {ways}"
    return RunFailed(f"{run}  step {step}", None, rule, fix)


def refuse_nan_metrics(metrics: Mapping[str, Any], step: int) -> None:
    """Nothing, if every figure of an evaluation is a number.

    Raises:
        RunFailed: one is not.
    """
    bad = [f"{k} {v}" for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    if bad:
        rule = "This evaluation gave no number, and nothing can be steered by it."
        raise RunFailed(f"step {step}", ", ".join(bad), rule, "Look at the validation rows and the learning rate.")


class LossNotes(TrainerCallback):
    """Says on stderr and in the log when the loss jumps, and when it has long stopped falling."""

    def __init__(self, write_line: Callable[[dict[str, Any]], None]):
        self._write_line = write_line

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        note = describe_loss([entry["loss"] for entry in state.log_history if "loss" in entry])
        if note is not None:
            self._write_line({"step": state.global_step, "note": note})
            print(f"\nstep {state.global_step}: {note}", file=sys.stderr)


def describe_loss(losses: Sequence[float]) -> str | None:
    """What is to be said of the last of the logged losses, if anything."""
    *before, last = losses
    recent = before[-SPIKE_WINDOW:]
    if len(recent) >= SPIKE_WINDOW // 2:
        usual = statistics.median(recent)
        if last > SPIKE_FACTOR * usual and last > max(recent):
            return f"the loss jumped to {last:.3f}; it was {usual:.3f} in the median of the last {len(recent)} values"
    if len(losses) % PLATEAU_WINDOW == 0 and losses:
        half = PLATEAU_WINDOW // 2
        first, second = (statistics.median(part) for part in (losses[-PLATEAU_WINDOW:-half], losses[-half:]))
        if second > first * (1 - PLATEAU_SHARE):
            return f"the loss has not fallen for {PLATEAU_WINDOW} logged values: {first:.3f}, then {second:.3f}"
    return None
