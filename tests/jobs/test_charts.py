"""Charts of the comparison's page, as SVG."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.charts import Line, Mark, Spot, bars, curves, log_ticks, spots, ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_ticks_are_few_even_and_round_what_is_shown(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0], rtol=1e-3)
    assert found[0] <= low + steps[0] * 1e-3
    assert found[-1] >= low + span - steps[0] * 1e-3


@pytest.mark.parametrize(("low", "high"), [(1, 500), (0.004, 0.005), (1, 1), (3697, 1.8e6)])
def test_logarithmic_ticks_lie_between_the_two(low, high):
    found = log_ticks(low, high)
    assert found == sorted(set(found))
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in found)
    assert found


def test_a_curve_goes_through_its_points():
    line = Line("a", 0, [(1.0, 0.0), (10.0, 20.0), (100.0, 40.0)])
    for log in (False, True):
        svg = curves([line], [], "epochs", "AP", log)
        (points,) = re.findall(r'<polyline points="([^"]*)"', svg)
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        (x0, y0), (x1, y1), (x2, y2) = places
        assert y0 > y1 > y2
        assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
        expected = 1.0 if log else (10 - 1) / (100 - 10)  # equal steps of a logarithmic axis
        assert (x1 - x0) / (x2 - x1) == pytest.approx(expected, abs=0.01)


def test_charts_without_numbers_are_not_drawn():
    assert curves([], [], "epochs", "AP", False) == ""
    assert curves([Line("a", 0, [(0.0, 1.0)])], [], "epochs", "AP", True) == ""
    assert bars([], "points of AP") == ""


def test_labels_of_marks_keep_their_distance():
    line = Line("a", 0, [(1.0, 40.0), (50.0, 44.0)])
    marks = [Mark(f"paper {ap}", 0, 50.0, ap, "paper") for ap in (43.8, 43.9, 43.7, 42.3)]
    svg = curves([line], marks, "epochs", "AP", False)
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)">paper', svg))
    assert len(heights) == 4
    assert min(np.diff(heights)) >= 14.9


def test_spots_lie_where_their_values_are():
    rows = [Spot("a", 0, [40.0, 41.0], (39.0, 43.0), 42.0), Spot("b", 1, [], None, None)]
    svg = spots(rows, "AP")
    a, b = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    low, high = map(float, re.search(r'span" d="M([\d.]+) [\d.]+H([\d.]+)"', svg).groups())
    (paper,) = map(float, re.findall(r'paper" d="M([\d.]+)', svg))
    places = np.array([low, a, b, paper, high])  # 39 to 43
    np.testing.assert_allclose(np.diff(places), places[1] - places[0], atol=0.2)
    assert spots([Spot("b", 1, [], None, 40.0)], "AP") == ""


def test_bars_are_as_long_as_their_values():
    svg = bars([("up", 2.0), ("down", -1.0), ("none", 0.0)], "points of AP")
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[2] < 1
