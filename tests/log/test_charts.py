"""Bars are as high as what they stand for."""

import re
from itertools import pairwise

from emu35.log.charts import Bar, bar_chart


def heights(chart: str) -> list[float]:
    return [float(found) for found in re.findall(r'<rect [^>]*height="([0-9.]+)"', chart)]


def test_bars_keep_their_proportions_and_their_names() -> None:
    bars = [Bar(name=name, value=value) for name, value in (("a", 10), ("<b>", 0), ("c", 40))]
    chart = bar_chart(bars, x_label="kind", title="Bars & more")
    low, none, high = heights(chart)
    assert none == 0
    assert abs(high - 4 * low) < 0.5
    assert high > 200, "the highest uses the height there is"
    assert "&lt;b&gt;" in chart
    assert "<b>" not in chart
    assert "Bars &amp; more" in chart


def test_many_bars_leave_names_out_rather_than_overlapping_them() -> None:
    bars = [Bar(name=f"{2**k}", value=1) for k in range(40)]
    chart = bar_chart(bars, x_label="", title="")
    assert len(heights(chart)) == 40
    places = [float(x) for x in re.findall(r'<text x="([0-9.]+)" [^>]*>\d{2,}</text>', chart)]
    assert 2 <= len(places) < 20
    assert all(b - a >= 40 for a, b in pairwise(places[2:]))


def test_without_bars_there_is_no_chart() -> None:
    assert bar_chart([], x_label="", title="") == ""
