"""The audit as tables that a person likes to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ft.data.audit import AuditReport, Check, Lengths
from lora_ft.data.report import DataReport, SplitReport

BARS = " ▁▂▃▄▅▆▇█"
MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "warning": ("!", "bold red")}
"""Sign and style of each verdict."""


def print_audit(report: AuditReport, console: Console | None = None) -> None:
    """The report printed: the way of all rows, the splits, what was found, and a line that sums it up."""
    console = console or Console()
    console.print(_describe_way(report.data))
    console.print(_table_splits(report))
    if report.labels:
        console.print(_describe_counts("labels", report.labels))
    if len(report.scripts) > 1:
        console.print(_describe_counts("scripts", report.scripts))
    if report.data.redacted:
        console.print(_describe_counts("masked", report.data.redacted))
    console.print(_table_checks(report))
    console.print(_sum_up(report))


def _describe_way(data: DataReport) -> Text:
    parts = [f"{data.num_read:,} rows read", f"{data.num_kept:,} dealt to splits"]
    left_out = {
        "bad": data.num_skipped,
        "left out by weight": data.num_left_out_weight,
        "left out to balance labels": data.num_left_out_balance,
    }
    return Text(" · ".join([*parts, *(f"{count:,} {reason}" for reason, count in left_out.items() if count)]))


def _describe_counts(title: str, counts: Mapping[str, int]) -> Text:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:8]
    return Text(f"{title}: " + " · ".join(f"{name} {count:,} ({count / total:.0%})" for name, count in ordered))


def _table_splits(report: AuditReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("split", "rows", "tokens", "learned", "min", "mid", "max", "lengths", "padding", "packed"):
        table.add_column(name, justify="left" if name in ("split", "lengths") else "right", no_wrap=True)
    for name, split in report.data.splits.items():
        table.add_row(name, *_describe_split(split, report.lengths.get(name)))
    return table


def _describe_split(split: SplitReport, lengths: Lengths | None) -> Iterator[str]:
    yield f"{split.num_documents:,}"
    yield _shorten_count(split.num_tokens)
    yield f"{split.num_supervised_tokens / split.num_tokens:.0%}" if split.num_tokens else "–"
    if lengths is None:
        return
    highest = max(lengths.histogram)
    yield from (f"{length:,}" for length in (lengths.shortest, lengths.median, lengths.longest))
    yield "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in lengths.histogram)
    yield f"{lengths.padded_share:.0%}"
    yield f"{lengths.packed_share:.1%}"


def _shorten_count(count: int) -> str:
    """Three digits and a unit: 827k, 12.3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _table_checks(report: AuditReport) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    clean = [check.name for check in report.checks if check.verdict == "ok"]
    for check in report.checks:
        if check.verdict != "ok":
            sign, style = MARKS[check.verdict]
            table.add_row(Text(sign, style), Text(f"{check.count:,}", justify="right"), _describe_check(check))
    if clean:
        table.add_row(Text(*MARKS["ok"]), Text("0", justify="right"), Text(", ".join(clean), "dim"))
    return table


def _describe_check(check: Check) -> Text:
    where = f"  {', '.join(_shorten_place(place) for place in check.places)}" if check.places else ""
    return Text.assemble((check.name, "bold"), f". {check.meaning}", (where, "dim"))


def _shorten_place(place: str) -> str:
    """A place without the folders before the file."""
    file, _, line = place.rpartition(":")
    return f"{Path(file).name}:{line}" if file else place


def _sum_up(report: AuditReport) -> Text:
    notes = sum(check.verdict == "note" for check in report.checks)
    noted = f"{notes} {'note' if notes == 1 else 'notes'}."
    if not report.warnings:
        return Text(f"No warnings, {noted}", "green")
    warned = f"{len(report.warnings)} {'warning' if len(report.warnings) == 1 else 'warnings'}"
    strict = "data.strict refuses them." if report.is_strict else "data.strict: true refuses warnings."
    return Text(f"{warned}, {noted} {strict}", "bold red")
