"""Bars are as high as what they stand for."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

from emu35.log.charts import Bar, Series, bar_chart, line_charts_svg


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


def test_a_picture_of_charts_is_a_file_of_its_own() -> None:
    def chart(*last: float) -> list[Series]:
        return [
            Series(name=f"<{place}>", points=[(0, 1.0), (10, y)]) for place, y in enumerate(last)
        ]

    svg = line_charts_svg({"PSNR & co": chart(20, 30), "usage": chart(1, 2)}, x_label="step")
    found = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    texts = ["".join(text.itertext()) for text in found.iter(f"{name}text")]
    assert texts.count("<0>") == texts.count("<1>") == 1, "one legend for both"
    assert {"PSNR & co", "usage"} <= set(texts)
    lines = list(found.iter(f"{name}polyline"))
    assert len(lines) == 4
    _, low = (float(point.split(",")[1]) for point in lines[0].attrib["points"].split())
    _, high = (float(point.split(",")[1]) for point in lines[1].attrib["points"].split())
    assert high < low, "30 is drawn above 20"
