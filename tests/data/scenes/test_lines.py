"""Drawn text is where it is said to be, as high as it is said to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.data.scenes.lines import line_heights, render_lines

BOUNDS = [0.05, 0.1, 0.2]


@settings(max_examples=25)
@given(number=st.integers(0, 500), side=st.sampled_from([128, 256, 400]))
def test_ink_lies_in_the_boxes_and_nowhere_else(number: int, side: int) -> None:
    image, lines = render_lines(number, side=side, heights=line_heights(BOUNDS), seed=1)
    pixels = np.asarray(image).astype(int)
    inked = (np.abs(pixels - pixels[0, 0]) > 8).any(2)
    covered = np.zeros_like(inked)
    for line in lines:
        x0, y0, x1, y1 = (value * side for value in line.box)
        assert 0 <= x0 < x1 <= side
        assert 0 <= y0 < y1 <= side
        region = (
            slice(max(0, int(y0) - 2), int(np.ceil(y1)) + 2),
            slice(max(0, int(x0) - 2), int(np.ceil(x1)) + 2),
        )
        assert inked[region].any(), line
        covered[region] = True
    assert not (inked & ~covered).any()


@pytest.mark.parametrize("bounds", [BOUNDS, [], [0.3], [0.02, 0.5, 0.9]])
def test_every_range_of_heights_gets_lines(bounds: list[float]) -> None:
    edges = [0.0, *bounds, 1.0]
    met = set()
    for number in range(8):
        _, lines = render_lines(number, side=256, heights=line_heights(bounds), seed=0)
        assert lines
        for line in lines:
            height = line.box[3] - line.box[1]
            met.add(sum(height >= edge for edge in edges[1:]))
    assert set(range(min(len(bounds), 2) + 1)) <= met


def test_a_picture_holds_the_same_at_every_resolution_and_another_for_another_seed() -> None:
    small, large, other = (
        [line.text for line in render_lines(4, side=side, heights=[0.06, 0.15], seed=seed)[1]]
        for side, seed in ((64, 7), (512, 7), (64, 8))
    )
    assert small == large
    assert small != other
