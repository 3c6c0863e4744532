import itertools
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.reporting.charts import Chart, Series, format_value, log_ticks, plot, thin, ticks
from jaxft.reporting.pages import environment

_finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(_finite, _finite)
def test_ticks_are_few_even_and_inside(a, b):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    if high - low < 1e-6 * max(abs(low), abs(high)) or high == low:
        return
    assert 1 <= len(found) <= 6
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in found)
    gaps = [y - x for x, y in itertools.pairwise(found)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-3) for gap in gaps)


def render(chart):
    """Returns a chart as its template draws it."""
    template = "{% from 'charts.html' import chart %}{{ chart(plot) }}"
    return environment().from_string(template).render(plot=plot(chart))


def heights_of(html):
    """Returns the place of each label of the axis of values, in per cent from the top."""
    return {float(t): float(p) for p, t in re.findall(r'top:([\d.]+)%">([\d.]+)</i>', html)}


def drawn(html):
    """Returns what the script of a chart knows of its series."""
    return json.loads(re.search(r"<script[^>]*>(.*?)</script>", html).group(1))


def test_values_that_span_decades_stand_on_a_logarithmic_axis():
    points = [(0, 3.0), (10, 0.3), (20, 0.03), (30, 0.0)]
    html = render(
        Chart(title="t", note="n", series=[Series(name="s", points=points)], decades=True)
    )
    assert "n, logarithmic" in html
    heights = heights_of(html)
    assert heights[0.1] - heights[1.0] == pytest.approx(heights[0.2] - heights[2.0], abs=0.02)
    (data,) = drawn(html)
    tops = [point[1] for point in data["points"]]
    assert tops[1] - tops[0] == pytest.approx(tops[2] - tops[1], abs=0.02)
    assert tops[3] == 100  # what has no logarithm stands at the foot
    near = [(0, 3.0), (10, 1.0)]
    assert "logarithmic" not in render(
        Chart(title="t", note="n", series=[Series(name="s", points=near)], decades=True)
    )


@given(st.floats(1e-6, 1e6), st.floats(10, 1e9))
def test_ticks_of_decades_are_few_and_inside(low, ratio):
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 8
    assert all(low <= tick <= low * ratio for tick in found)


def test_a_point_of_several_steps_says_which():
    series = Series(
        name="s", points=[(4.5, 1.0), (14.5, 0.5)], spans={4.5: (1, 10), 14.5: (11, 20)}
    )
    html = render(Chart(title="t", note="", series=[series], steps=(0, 20)))
    (data,) = drawn(html)
    assert [point[2] for point in data["points"]] == ["steps 1 to 10", "steps 11 to 20"]
    assert [point[0] for point in data["points"]] == [22.5, 72.5]


def test_thinning_keeps_ends_spikes_and_order():
    points = [(float(i), 1.0 + i / 1e6) for i in range(50_000)]
    points[31_415] = (31_415.0, 99.0)
    points[27_182] = (27_182.0, -99.0)
    kept = thin(points, 500)
    assert len(kept) <= 502
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert points[31_415] in kept
    assert points[27_182] in kept
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})


def test_points_lie_where_the_axes_say():
    chart = Chart(
        title="t", note="", series=[Series(name="s", points=[(0, 0.0), (50, 5.0), (100, 10.0)])]
    )
    html = render(chart)
    (data,) = drawn(html)
    heights = heights_of(html)
    for x, y, step, text in data["points"]:
        assert f"step {x:.0f}" == step
        if float(text) in heights:
            assert y == pytest.approx(heights[float(text)], abs=0.02)
    assert {0.0, 10.0} <= heights.keys()
    assert heights[0.0] == 100 > heights[10.0]  # from the top


def test_a_gap_breaks_the_line_and_a_lone_value_is_a_dot():
    points = [(0, 1.0), (1, math.nan), (2, 2.0), (3, 3.0)]
    html = render(Chart(title="t", note="", series=[Series(name="s", points=points)]))
    path = re.search(r'class="line c0" d="([^"]+)"', html).group(1)
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert path.count("h0") == 1
    assert "not finite" in html


def test_nothing_finite_is_said_and_not_drawn():
    html = render(Chart(title="t", note="", series=[Series(name="s", points=[(1, math.nan)])]))
    assert "No finite values" in html
    assert "<svg" not in html


def test_names_cannot_break_out_of_the_page():
    bad = "</script><img src=x onerror=alert(1)>\"'"
    series = [Series(name=bad, points=[(0, 1.0), (1, 2.0)]), Series(name="b", points=[(0, 1.0)])]
    html = render(Chart(title=bad, note=bad, series=series, mark=(1, 2.0, bad)))
    assert "<img" not in html
    assert html.count("</script>") == 1


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.34567, "number", "2.346"),
        (0.00123, "number", "0.00123"),
        (1234.5, "number", "1234"),
        (0.4123, "percent", "41.2 %"),
        (12345.6, "count", "12,346"),
        (2e-5, "rate", "2e-5"),
        (0.0, "rate", "0"),
        (math.inf, "number", "not finite"),
    ],
)
def test_values_are_written_for_readers(value, unit, text):
    assert format_value(value, unit) == text
