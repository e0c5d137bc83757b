"""What to think of a run, in words: one finding a cause, with the numbers behind it and what to change next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_ft.evaluation.curves import Curves, Point, validation_noise

if TYPE_CHECKING:
    from lora_ft.data.audit import AuditReport
    from lora_ft.evaluation.classify import Constant
    from lora_ft.evaluation.compare import Comparison, Figure

LEAKED_SHARE = 0.01
"""Share of held-out rows that stand in training too, from which the test's figures cannot be believed."""
STILL_FALLING = 0.05
"""Share of all that the loss has fallen, lost in the last fifth of the steps: it would fall further."""
WATCHED_FROM = 0.7
"""Share of the steps from which on a validation before the last one tells what the last fifth did."""
BARELY = 0.02
"""Share of its mean over the first fifth by which a loss must fall for anything to be learned."""
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
    kept_step: int | None
    """The step that validation chose, whose adapter was kept; None where that of the last step was."""

    @property
    def main(self) -> Figure | None:
        """What base and tuned are judged by: the loss, or the first figure of a task that has none."""
        figures = self.compared.figures
        return figures.get("loss") or next(iter(figures.values()), None)

    @property
    def constant(self) -> Constant | None:
        """Tuned against a model that reads nothing; None of tasks without classes."""
        return getattr(self.compared, "constant", None)

    @property
    def is_clearly_better(self) -> bool:
        """Whether the tuned model is better by more than what may be an accident of the test rows."""
        judged = [figure for figure in (self.main, self.constant and self.constant.loss) if figure]
        return bool(judged) and all(_gain(figure).low > 0 for figure in judged)

    @property
    def kept(self) -> Point | None:
        """Where validation stood with the adapter that was kept; None without validation."""
        points = self.curves.validation
        return next((point for point in points if point.step == self.kept_step), points[-1] if points else None)

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

        leaking split ► overfit ► not measured ► no better than base ► no better than a constant answer
        ► not enough data ► underfit ► good fit

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
    curves, kept = evidence.curves, evidence.kept
    turning = curves.turning_before(kept) if kept is not None else None
    if kept is None or turning is None:
        return
    if turning.step == 0:
        how, advice = "", "Every step made it worse: "
    elif evidence.kept_step is not None:
        how = ", whose adapter was kept"
        advice = "Keep the step of the lowest loss (training.metric_for_best_model: loss), or "
    else:
        how = f" while the training loss went down to {curves.train[-1].loss:.3f}" if curves.train else ""
        advice = "Stop there and keep that step (training.early_stopping_patience: 2), or "
    because = (
        f"Validation loss was lowest at step {turning.step} (epoch {turning.epoch:.1f}) with {turning.loss:.3f},"
        f" and rose to {kept.loss:.3f} by step {kept.step}{how}."
    )
    epochs = max(1, round(turning.epoch))
    is_shorter = turning.step > 0 and kept.epoch > epochs
    shorter = f"train {epochs} epoch{'s' * (epochs > 1)} instead of {kept.epoch:.0f}" if is_shorter else ""
    yield Finding("overfit", because, advice + (shorter or "lower training.learning_rate") + "; more rows help most.")


def _find_no_better(evidence: Evidence) -> Iterator[Finding]:
    figure = evidence.main
    if figure is None or _gain(figure).value > 0:
        return
    because = f"{_describe_difference(figure)} on {figure.num_rows} test rows: the adapter does not help."
    standstill = _find_standstill(evidence.curves)
    if standstill is not None:
        advice = standstill.advice
    else:
        advice = "Whatever it learned, it is not this: check that test and training rows are of one kind."
    yield Finding("no better than base", because, advice)


def _find_no_better_than_constant(evidence: Evidence) -> Iterator[Finding]:
    """The base of a classifier has a head drawn at random, so that to be better than it says little."""
    constant = evidence.constant
    if constant is None:
        return
    loss, accuracy = constant.loss, constant.accuracy
    is_surely_worse = accuracy.difference.high < 0
    may_be_better = _gain(loss).value > 0 or accuracy.difference.low > 0
    if may_be_better and not is_surely_worse:
        return
    because = (
        f"{_describe_constant(constant)} The tuned model is right on {accuracy.tuned.value:.1%} (difference between"
        f" {accuracy.difference.low:+.1%} and {accuracy.difference.high:+.1%} with 95% confidence) with a loss of"
        f" {loss.tuned.value:.3g} ({loss.difference.low:+.3g} to {loss.difference.high:+.3g})."
    )
    advice = (
        "If it is not right on its training rows either, train longer or raise training.learning_rate (1e-4 to 2e-3"
        " is usual for LoRA); if it is, it learned them by heart: more rows help most, then fewer epochs."
    )
    yield Finding("no better than a constant answer", because, advice)


def _find_unmeasured(evidence: Evidence) -> Iterator[Finding]:
    if evidence.main is not None:
        return
    because, advice = "There is no test row, so nothing was compared.", "Give data.split.test a share."
    if evidence.compared.num_supervised_tokens:
        because, advice = " ".join(evidence.compared.notes), "Lower training.learning_rate, and see what the log says."
    yield Finding("not measured", because, advice)


def _find_too_little(evidence: Evidence) -> Iterator[Finding]:
    figure, rows, constant = evidence.main, evidence.num_train_rows, evidence.constant
    against = {"": figure}
    if constant is not None and constant.accuracy.difference.low <= 0:
        against["Against a constant answer: "] = constant.loss
    unclear = [(name, each) for name, each in against.items() if each and _gain(each).value > 0 >= _gain(each).low]
    if unclear:
        name, each = unclear[0]
        gain = _gain(each)
        needed = round(each.num_rows * ((gain.value - gain.low) / gain.value) ** 2)
        because = (
            f"{name}{_describe_difference(each)} on {each.num_rows} test rows: it may be an accident of these rows."
        )
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
    standstill = _find_standstill(curves)
    if standstill is not None and not evidence.is_clearly_better:
        yield standstill
        return
    is_validated = any(point.step >= WATCHED_FROM * curves.validation[-1].step for point in curves.validation[:-1])
    name, points = ("validation", curves.validation) if is_validated else ("training", curves.train)
    falling = _share_falling_validated(curves) if is_validated else _share_falling(curves)
    if falling is not None and falling >= STILL_FALLING:
        because = f"The {name} loss was still falling: {falling:.0%} of all it fell, in the last fifth of the steps."
        epochs = points[-1].epoch
        advice = f"Train longer: training.num_train_epochs (now {epochs:.3g}), or a higher learning rate."
        yield Finding("underfit", because, advice)


def _find_unwatched(evidence: Evidence) -> Iterator[Finding]:
    """A course too short to be judged is no good one."""
    points = len(evidence.curves.train)
    if points < FEW_POINTS:
        because = f"The training loss was logged {points} times: too few to tell whether it was still falling."
        is_each = points == evidence.curves.train[-1].step if points else False
        rarely = "" if is_each else ", or log more often (training.logging_steps: 1)"
        yield Finding("not measured", because, f"Train longer{rarely}.")


CAUSES: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    _find_leaks,
    _find_overfit,
    _find_unmeasured,
    _find_no_better,
    _find_no_better_than_constant,
    _find_too_little,
    _find_underfit,
    _find_unwatched,
)
"""What can be wrong, a cause before what it causes."""


def _describe_good_fit(evidence: Evidence) -> Finding:
    figure, constant = evidence.main, evidence.constant
    assert figure is not None, "what was not measured is a finding"
    parts = [f"{_describe_difference(figure)} on {figure.num_rows} test rows.", _describe_validation(evidence)]
    if constant is not None:
        parts.insert(1, _describe_constant(constant))
    return Finding("good fit", " ".join(parts), "Read the answers side by side, then use it.")


def _describe_validation(evidence: Evidence) -> str:
    """How validation stood with the adapter that was kept, where it had not turned by then."""
    kept, lowest, turning = evidence.kept, evidence.curves.lowest, evidence.curves.turning
    if kept is None or lowest is None:
        return "Without validation nobody knows whether it turned on the way."
    if evidence.kept_step is None:
        return f"Validation loss ended at {kept.loss:.3f}, within noise of its lowest."
    if turning is not None and turning.step == kept.step:
        return f"Validation turned at step {kept.step}, and the adapter of that step was kept."
    least = "its lowest" if kept.loss <= lowest.loss else f"and {lowest.loss:.3f} at its lowest, at step {lowest.step}"
    return f"The adapter of step {kept.step} was kept: validation loss was {kept.loss:.3f} there, {least}."


def _describe_constant(constant: Constant) -> str:
    right, loss = constant.accuracy.base.value, constant.loss.base.value
    return (
        f'Always "{constant.label}" would be right on {right:.1%}, and the classes\' shares have a loss of {loss:.3g}.'
    )


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
    if evidence.kept_step is not None:
        kept = f"step {evidence.kept_step}"
        steered = f"The {rows['validation']} validation rows chose the step whose adapter was kept: {kept}."
    elif evidence.curves.validation:
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


def _find_standstill(curves: Curves) -> Finding | None:
    """Underfit, where the training loss surely did not fall; None where it did, or where its noise hides it."""
    losses = [point.loss for point in curves.train]
    fifth = len(losses) // 5
    if len(losses) < FEW_POINTS:
        return None
    first, last = (sum(part) / fifth for part in (losses[:fifth], losses[-fifth:]))
    noise = _noise_of_means(losses, fifth)
    went = f"from {first:.3f} to {last:.3f}"
    if last - first > noise:
        because = f"The training loss rose {went}, in the mean of the first and the last fifth of the steps."
        return Finding("underfit", because, "Training made the loss worse: lower training.learning_rate.")
    if first - last + noise < BARELY * first:
        because = f"The training loss went {went} only, in the mean of the first and the last fifth of the steps."
        advice = "raise training.learning_rate (1e-4 to 2e-3 is usual for LoRA), or lora.r."
        return Finding("underfit", because, f"Training hardly moved the loss: {advice}")
    return None


def _share_falling(curves: Curves) -> float | None:
    """How much of all it fell the training loss fell in the last fifth; None where noise hides it."""
    losses = [point.loss for point in curves.train]
    fifth = len(losses) // 5
    if len(losses) < FEW_POINTS:
        return None
    parts = (losses[:fifth], losses[-2 * fifth : -fifth], losses[-fifth:])
    first, before, last = (sum(part) / fifth for part in parts)
    is_clear = before - last > _noise_of_means(losses[len(losses) // 2 :], fifth)
    return (before - last) / (first - last) if is_clear and first > last else None


def _share_falling_validated(curves: Curves) -> float | None:
    """How much of all it fell the validation loss fell in the last fifth of its steps; None where noise hides it."""
    points = curves.validation
    steps, losses = [point.step for point in points], [point.loss for point in points]
    before, last = float(np.interp(0.8 * steps[-1], steps, losses)), losses[-1]
    is_clear = curves.turning is None and before - last > validation_noise(last)
    return (before - last) / (losses[0] - last) if is_clear and losses[0] > last else None


def _noise_of_means(losses: Sequence[float], size: int) -> float:
    """Two standard errors of the difference between the means of two stretches of `size` losses.

    The noise is that between neighbours, so that a slope does not count as noise.
    Source: von Neumann 1941, "Distribution of the Ratio of the Mean Square Successive Difference to the Variance".
    """
    variance = float(np.mean(np.diff(losses) ** 2)) / 2
    return 2 * math.sqrt(2 * variance / size)
