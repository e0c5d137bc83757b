"""Numbers as places in a drawing, for the page's SVG. Nothing here knows colours or words of the page.

Drawings are `WIDTH` units wide; y runs down, as in SVG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_ft.evaluation.curves import Curves, Point

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 18, 34
LOGARITHMIC_FROM = 25
"""Ratio of the largest loss to the smallest from which the axis is logarithmic, or the end of the curve is a line."""
MOST_POINTS = 4 * WIDTH
"""Points of a line; more would lie upon each other."""
SMOOTHED_POINTS = 40
"""Points of the training loss above which it is also drawn smoothed."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    """Where, in units of the drawing."""
    label: str
    """What stands beside it."""


@dataclass(frozen=True)
class Spot:
    """A marked point of a curve."""

    x: float
    """In units of the drawing."""
    y: float
    """In units of the drawing."""
    label: str
    """What it says when asked."""


@dataclass(frozen=True)
class LossChart:
    """The loss curves, ready to draw."""

    train: str
    """Points of the training loss as SVG takes them."""
    smooth: str
    """The same, smoothed; empty where there are few points."""
    validation: str
    """Points of the validation loss."""
    spots: tuple[Spot, ...]
    """Each validation point."""
    turning: Spot | None
    """Where validation turned."""
    x_ticks: tuple[Tick, ...]
    """Steps."""
    y_ticks: tuple[Tick, ...]
    """Losses."""
    is_logarithmic: bool
    """Whether the axis of losses is."""


def draw_losses(curves: Curves) -> LossChart | None:
    """The chart of a run's losses; None before anything was logged."""
    points = [*curves.train, *curves.validation]
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    if not losses:
        return None
    last_step = max(1, *(point.step for point in points))
    y = _Scale.of(losses)

    def place(point: Point) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * point.step / last_step, y.place(point.loss)

    def line(points: Sequence[Point]) -> str:
        drawn = (place(point) for point in _thin([point for point in points if math.isfinite(point.loss)]))
        return " ".join(f"{across:.1f},{down:.1f}" for across, down in drawn)

    def spot(point: Point) -> Spot:
        return Spot(*place(point), f"step {point.step}, epoch {point.epoch:.2f}: {point.loss:.4f}")

    steps = nice_ticks(0, last_step, 6)
    return LossChart(
        train=line(curves.train),
        smooth=line(_smooth(curves.train)) if len(curves.train) > SMOOTHED_POINTS else "",
        validation=line(curves.validation),
        spots=tuple(spot(point) for point in curves.validation if math.isfinite(point.loss)),
        turning=spot(curves.turning) if curves.turning else None,
        x_ticks=tuple(Tick(place(Point(int(step), 0, 1))[0], f"{step:,.0f}") for step in steps if step == int(step)),
        y_ticks=y.ticks(),
        is_logarithmic=y.is_logarithmic,
    )


@dataclass(frozen=True)
class _Scale:
    """Losses on the vertical axis."""

    low: float
    """Loss at the bottom."""
    high: float
    """Loss at the top."""
    is_logarithmic: bool
    """Whether equal ratios, not differences, are equally far apart."""

    @classmethod
    def of(cls, losses: Sequence[float]) -> _Scale:
        low, high = min(losses), max(losses)
        if low > 0 and high / low > LOGARITHMIC_FROM:
            return cls(low * 0.8, high * 1.1, True)
        return cls(0.0 if low < 0.5 * high else low - 0.1 * (high - low), high + 0.05 * (high - low or 1), False)

    def place(self, loss: float) -> float:
        low, high, value = self.low, self.high, loss
        if self.is_logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(loss, self.low))
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def ticks(self) -> tuple[Tick, ...]:
        if self.is_logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            values = nice_ticks(self.low, self.high, 5)
        return tuple(Tick(self.place(value), f"{value:.4g}") for value in values if self.low <= value <= self.high)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Means over a twentieth of the points to either side."""
    points = [point for point in points if math.isfinite(point.loss)]
    reach, end = max(2, len(points) // 20), len(points)
    sums = [0.0, *itertools.accumulate(point.loss for point in points)]
    bounds = ((max(0, index - reach), min(end, index + reach + 1)) for index in range(end))
    means = ((sums[stop] - sums[start]) / (stop - start) for start, stop in bounds)
    return [Point(point.step, point.epoch, mean) for point, mean in zip(points, means, strict=True)]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """The lowest and the highest of each few neighbours, where there are more points than a drawing can show."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    groups = (points[start : start + size] for start in range(0, len(points), size))
    extremes = ((min(group, key=_loss_of), max(group, key=_loss_of)) for group in groups)
    return [point for pair in extremes for point in sorted(set(pair), key=lambda point: point.step)]


def _loss_of(point: Point) -> float:
    return point.loss


def draw_bars(counts: Sequence[int], width: float, height: float) -> list[tuple[float, float, float, float]]:
    """A rectangle (x, y, width, height) for each count, side by side, the largest as high as the drawing."""
    if not counts or not max(counts):
        return []
    step, largest = width / len(counts), max(counts)
    return [
        (index * step, height * (1 - count / largest), step * 0.86, height * count / largest)
        for index, count in enumerate(counts)
    ]
