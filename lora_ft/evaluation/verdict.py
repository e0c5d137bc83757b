"""What to think of a run, in words: one finding a cause, with the numbers behind it and what to change next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_ft.evaluation.curves import Curves

if TYPE_CHECKING:
    from lora_ft.data.audit import AuditReport
    from lora_ft.evaluation.compare import Comparison, Figure

LEAKED_SHARE = 0.01
"""Share of held-out rows that stand in training too, from which the test's figures cannot be believed."""
STILL_FALLING = 0.05
"""Share of all that the loss has fallen, lost in the last fifth of the steps: it would fall further."""
BARELY = 0.02
"""Share of its first value by which a loss must fall for anything to be learned."""
FEW_ROWS = 50
"""Training rows below which a domain is hardly described."""
FEW_TEST_ROWS = 10
"""Test rows below which resampling them says little: their intervals come out too narrow."""
FEW_POINTS = 10
"""Logged training losses below which the last fifth says nothing."""
FORGOTTEN = 0.1
"""Share by which the loss on general text may rise."""


@dataclass(frozen=True)
class Evidence:
    """All that a verdict is made of."""

    curves: Curves
    """How training went."""
    compared: Comparison
    """Base against tuned on the test split."""
    audit: AuditReport
    """The data."""
    keeps_best: bool
    """Whether the adapter is that of the lowest validation loss, not of the last step."""

    @property
    def main(self) -> Figure | None:
        """What base and tuned are judged by: the loss, or the first figure of a task that has none."""
        figures = self.compared.figures
        return figures.get("loss") or next(iter(figures.values()), None)

    @property
    def num_train_rows(self) -> int:
        """Rows trained on."""
        return self.audit.data.splits["train"].num_documents


@dataclass(frozen=True)
class Finding:
    """One thing that is true of the run."""

    name: str
    """In two or three words."""
    because: str
    """The numbers behind it."""
    advice: str
    """What to change next."""


@dataclass(frozen=True)
class Verdict:
    """Findings, the one that matters most first."""

    findings: tuple[Finding, ...]
    """At least one."""
    method: str
    """What steered the run, and what the test split was used for."""

    @property
    def name(self) -> str:
        """The verdict in two or three words."""
        return self.findings[0].name

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, **asdict(self)}


def judge_run(evidence: Evidence) -> Verdict:
    """The verdict on a run.

        leaking split ► overfit ► not measured ► no better than base ► not enough data ► underfit ► good fit

    and then what was forgotten. A cause comes before what it causes: with a leaking split the other figures mean
    little.
    """
    found = tuple(finding for look in CAUSES for finding in look(evidence))
    fits = () if found else (_describe_good_fit(evidence),)
    return Verdict((*found, *fits, *_find_forgetting(evidence)), _describe_method(evidence))


def _find_leaks(evidence: Evidence) -> Iterator[Finding]:
    from lora_ft.data.audit import LEAKS

    splits = evidence.audit.data.splits
    held_out = sum(splits[name].num_rows for name in ("validation", "test"))
    counts = {check.name: check.count for check in evidence.audit.checks if check.name in LEAKS}
    leaked = sum(counts.values())
    if held_out and leaked / held_out >= LEAKED_SHARE:
        named = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        because = f"Of {held_out} held-out rows, {leaked / held_out:.0%} stand in training too: {named}."
        advice = "Figures on such rows measure memory. Take them out of one side, or let data.split deal all rows out."
        yield Finding("leaking split", because, advice)


def _find_overfit(evidence: Evidence) -> Iterator[Finding]:
    curves, turning = evidence.curves, evidence.curves.turning
    if turning is None or evidence.keeps_best:
        return
    last = curves.validation[-1]
    trained = f" while the training loss went down to {curves.train[-1].loss:.3f}" if curves.train else ""
    because = (
        f"Validation loss was lowest at step {turning.step} (epoch {turning.epoch:.1f}) with {turning.loss:.3f},"
        f" and rose to {last.loss:.3f} by step {last.step}{trained}."
    )
    advice = "Stop there and keep that step (training.early_stopping_patience: 2), or "
    epochs = max(1, round(turning.epoch))
    shorter = f"train {epochs} epoch{'s' * (epochs > 1)} instead of {last.epoch:.0f}" if last.epoch > epochs else ""
    yield Finding("overfit", because, advice + (shorter or "lower training.learning_rate") + "; more rows help most.")


def _find_no_better(evidence: Evidence) -> Iterator[Finding]:
    figure = evidence.main
    if figure is None or _gain(figure).value > 0:
        return
    because = f"{_describe_difference(figure)} on {figure.num_rows} test rows: the adapter does not help."
    fell = _share_fallen(evidence.curves)
    if fell is not None and fell < BARELY:
        advice = "Training hardly moved the loss: raise training.learning_rate (1e-4 to 2e-3 is usual for LoRA) or r."
    else:
        advice = "It learned its training rows, yet not this: check that test and training rows are of one kind."
    yield Finding("no better than base", because, advice)


def _find_unmeasured(evidence: Evidence) -> Iterator[Finding]:
    if evidence.main is None:
        because, advice = "There is no test row, so nothing was compared.", "Give data.split.test a share."
        yield Finding("not measured", because, advice)


def _find_too_little(evidence: Evidence) -> Iterator[Finding]:
    figure, rows = evidence.main, evidence.num_train_rows
    if figure is not None and (gain := _gain(figure)).value > 0 and gain.low <= 0:
        needed = round(figure.num_rows * ((gain.value - gain.low) / gain.value) ** 2)
        because = f"{_describe_difference(figure)} on {figure.num_rows} test rows: it may be an accident of these rows."
        yield Finding("not enough data", because, f"About {needed} test rows would tell a difference of this size.")
    elif rows < FEW_ROWS or (figure is not None and figure.num_rows < FEW_TEST_ROWS):
        because = f"There are {rows} training rows, and {figure.num_rows if figure else 0} test rows."
        advice = (
            f"Collect more: below some {FEW_ROWS} training rows a model learns sentences, not a task, and below some"
            f" {FEW_TEST_ROWS} test rows no figure means much."
        )
        yield Finding("not enough data", because, advice)


def _find_underfit(evidence: Evidence) -> Iterator[Finding]:
    curves = evidence.curves
    fell, falling = _share_fallen(curves), _share_falling(curves)
    if fell is not None and fell < BARELY:
        because = f"The training loss went from {curves.train[0].loss:.3f} to {curves.train[-1].loss:.3f} only."
        yield Finding("underfit", because, "Raise training.learning_rate (1e-4 to 2e-3 is usual for LoRA), or lora.r.")
    elif falling is not None and falling >= STILL_FALLING and curves.turning is None:
        because = f"The training loss was still falling: {falling:.0%} of all it fell, in the last fifth of the steps."
        last = curves.train[-1]
        advice = f"Train longer: training.num_train_epochs (now {last.epoch:.3g}), or a higher learning rate."
        yield Finding("underfit", because, advice)


def _find_unwatched(evidence: Evidence) -> Iterator[Finding]:
    """A course too short to be judged is no good one."""
    points = len(evidence.curves.train)
    if points < FEW_POINTS:
        because = f"The training loss was logged {points} times: too few to tell whether it was still falling."
        yield Finding("not measured", because, "Train longer, or log more often (training.logging_steps: 1).")


CAUSES: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    _find_leaks,
    _find_overfit,
    _find_unmeasured,
    _find_no_better,
    _find_too_little,
    _find_underfit,
    _find_unwatched,
)
"""What can be wrong, a cause before what it causes."""


def _describe_good_fit(evidence: Evidence) -> Finding:
    figure, curves = evidence.main, evidence.curves
    assert figure is not None, "what was not measured is a finding"
    parts = [f"{_describe_difference(figure)} on {figure.num_rows} test rows."]
    if curves.turning is not None:
        parts.append(f"Validation turned at step {curves.turning.step}, and the adapter of that step was kept.")
    elif curves.validation:
        last = curves.validation[-1]
        parts.append(f"Validation loss ended at {last.loss:.3f}, within noise of its lowest.")
    else:
        parts.append("Without validation rows nobody knows whether it turned on the way.")
    return Finding("good fit", " ".join(parts), "Read the answers side by side, then use it.")


def _find_forgetting(evidence: Evidence) -> Iterator[Finding]:
    general = evidence.compared.general
    if general is not None and general.difference.low > 0 and general.difference.value > FORGOTTEN * general.base.value:
        because = f"{_describe_difference(general)} on {general.num_rows} rows of general text."
        advice = "If that text matters, mix such rows into data.sources, or lower training.learning_rate or lora.r."
        yield Finding("forgetting", because, advice)


def _describe_method(evidence: Evidence) -> str:
    splits = evidence.audit.data.splits
    rows = {name: splits[name].num_documents for name in ("validation", "test")}
    steered = "The adapter is that of the last step; no validation row chose it."
    if rows["validation"] and evidence.keeps_best:
        steered = f"The {rows['validation']} validation rows chose the step whose adapter was kept."
    elif rows["validation"]:
        steered = (
            f"The {rows['validation']} validation rows watched the training; the adapter is that of the last step."
        )
    tested = f"The {rows['test']} test rows were read once, at the end, and chose nothing." if rows["test"] else ""
    return f"{steered} {tested}".strip()


@dataclass(frozen=True)
class _Gain:
    """How much better the tuned model is; below 0, worse."""

    value: float
    """Over the rows as they are."""
    low: float
    """At least, in 97.5% of resamples."""


def _gain(figure: Figure) -> _Gain:
    """The difference, turned so that more is better."""
    difference = figure.difference
    if figure.better == "higher":
        return _Gain(difference.value, difference.low)
    return _Gain(-difference.value, -difference.high)


def _describe_difference(figure: Figure) -> str:
    scale, mark = (100, "%") if figure.unit == "share" else (1, "")
    low, high = figure.difference.low * scale, figure.difference.high * scale
    name = {"nats": "The loss", "share": "The score"}.get(figure.unit, "The figure")
    return (
        f"{name} went from {figure.base.value * scale:.3g}{mark} to {figure.tuned.value * scale:.3g}{mark}"
        f" (difference between {low:+.3g} and {high:+.3g} with 95% confidence)"
    )


def _share_fallen(curves: Curves) -> float | None:
    """By what share of its first value the training loss fell; None where too little was logged."""
    if len(curves.train) < 2 or curves.train[0].loss <= 0:
        return None
    return 1 - curves.train[-1].loss / curves.train[0].loss


def _share_falling(curves: Curves) -> float | None:
    """How much of all it fell the training loss fell in the last fifth; None where too little was logged."""
    losses = [point.loss for point in curves.train]
    fifth = len(losses) // 5
    if len(losses) < FEW_POINTS:
        return None
    last, before = (sum(part) / fifth for part in (losses[-fifth:], losses[-2 * fifth : -fifth]))
    fallen = losses[0] - last
    return (before - last) / fallen if fallen > 0 else None
