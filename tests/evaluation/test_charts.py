"""Drawings of long runs, and of losses that are no numbers."""

import math

import pytest

from lora_ft.evaluation import charts
from lora_ft.evaluation.curves import Point


def test_smoothed_points_are_means_of_their_neighbours():
    losses = [float(number % 7) for number in range(100)]
    smooth = charts._smooth([Point(step, 0.0, loss) for step, loss in enumerate(losses)])
    for step, point in enumerate(smooth):
        near = losses[max(0, step - 5) : step + 6]
        assert point.loss == pytest.approx(sum(near) / len(near)), "a twentieth of a hundred to either side"


def test_one_loss_that_is_no_number_leaves_the_others():
    points = [Point(step, 0.0, math.nan if step == 3 else 2.0) for step in range(50)]
    assert {point.loss for point in charts._smooth(points)} == {2.0}


def test_long_runs_are_drawn_with_few_points_and_every_spike():
    points = [Point(step, 0.0, 100.0 if step == 54_321 else 2.0) for step in range(100_000)]
    drawn = charts._thin(points)
    assert len(drawn) <= charts.MOST_POINTS and Point(54_321, 0.0, 100.0) in drawn
    assert [point.step for point in drawn] == sorted(point.step for point in drawn)
    assert charts._thin(points[:500]) == points[:500]
