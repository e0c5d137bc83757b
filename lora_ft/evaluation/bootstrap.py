"""How sure a figure is: its spread over resamples of the rows, the same resamples for base and tuned model.

Shapes: N rows, k sums a row adds to a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0

Finish = Callable[[np.ndarray], float]
"""Sums over all rows [k] → the figure."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that holds it in 95% of resamples of the rows."""

    value: float
    """Over the rows as they are."""
    low: float
    """2.5% of the resamples lie below."""
    high: float
    """2.5% of the resamples lie above."""


@dataclass(frozen=True)
class Paired:
    """A figure of two models on the same rows."""

    base: Estimate
    """Without the adapter."""
    tuned: Estimate
    """With it."""
    difference: Estimate
    """Tuned less base, resample by resample: rows that are hard for both do not widen it."""


def ratio(sums: np.ndarray) -> float:
    """The first of two sums over the second: a mean weighted by tokens, or over rows; NaN of nothing."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def estimate_pair(base: np.ndarray, tuned: np.ndarray, finish: Finish) -> Paired:
    """The figures of two models from what each row adds [N, k], with intervals.

    Neither the order of batches nor their size enters: only rows, in their order, and a fixed seed.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile intervals);
    Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation" (paired resamples).
    """
    both, width, num_rows = np.concatenate([base, tuned], axis=1), base.shape[1], len(base)
    rng = np.random.default_rng(SEED)
    drawn = np.empty((NUM_RESAMPLES, 2))
    for resample in drawn:
        times_drawn = np.bincount(rng.integers(num_rows, size=num_rows), minlength=num_rows)
        sums = times_drawn @ both
        resample[:] = finish(sums[:width]), finish(sums[width:])
    values = finish(base.sum(0)), finish(tuned.sum(0))
    columns = [(values[0], drawn[:, 0]), (values[1], drawn[:, 1]), (values[1] - values[0], drawn[:, 1] - drawn[:, 0])]
    return Paired(*(_estimate(value, spread) for value, spread in columns))


def _estimate(value: float, spread: np.ndarray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(spread, [tail, 1 - tail]) if not np.isnan(spread).all() else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))
