"""What a section of data may not say, and how it is told."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.config import RunConfig
from emu35.config.data import (
    FilterConfig,
    Interpolation,
    SourceConfig,
    TokenDataConfig,
    is_drawn,
    ratio_at,
    ratio_points,
)
from emu35.config.schema import Misfits, build, to_plain, with_defaults


def problems_of(**settings: Any) -> list[str]:
    return list(TokenDataConfig(sources={"a": SourceConfig(path="x", **settings)}).problems())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"epochs": -1.0}, "data.sources.a.epochs=-1.0 draws nothing; give a positive number"),
        ({"epochs": 0.0}, "data.sources.a.epochs=0.0 draws nothing"),
        ({"max_tokens": 0}, "data.sources.a.max_tokens=0 draws nothing; use at least 1"),
        ({"schedule": {-1: 0.5}}, "schedule has the step -1; steps count from 0"),
        ({"schedule": {5: -0.5}}, "schedule has the ratio -0.5 at step 5; ratios are shares"),
        ({"schedule": {5: 0.0}}, "every ratio is 0 at step 5"),
        ({"schedule": {0: 0.0}}, "every ratio is 0; at least one source needs a positive ratio"),
        ({"filter": FilterConfig(min_tokens=-1)}, "data.sources.a.filter.min_tokens=-1 is neg"),
        ({"filter": FilterConfig(max_visual_share=1.5)}, "max_visual_share=1.5 lies outside 0..1"),
        (
            {"filter": FilterConfig(min_pictures=3, max_pictures=2)},
            "filter.min_pictures=3 exceeds max_pictures=2, so no document is left",
        ),
    ],
)
def test_what_a_source_may_not_say(settings: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(**settings)
    assert problem in found


def test_a_source_that_says_everything_is_sound() -> None:
    assert not problems_of(
        schedule={0: 1.0, 1000: 0.25},
        epochs=2.5,
        max_tokens=10**12,
        filter=FilterConfig(min_tokens=0, min_visual_share=0.0, max_visual_share=1.0),
    )


def test_sources_may_take_turns() -> None:
    sources = {
        "early": SourceConfig(path="x", schedule={100: 0.0}),
        "late": SourceConfig(path="y", ratio=0.0, schedule={100: 1.0}),
    }
    assert not list(TokenDataConfig(sources=sources).problems())
    sources["late"].schedule = {101: 1.0}
    (problem,) = TokenDataConfig(sources=sources).problems()
    assert "every ratio is 0 at step 100" in problem


schedules = st.dictionaries(st.integers(0, 10**6), st.floats(0, 10), max_size=5)


@given(ratio=st.floats(0, 10), schedule=schedules, step=st.integers(0, 2 * 10**6))
def test_ratios_go_from_point_to_point(ratio: float, schedule: dict[int, float], step: int) -> None:
    points = ratio_points(ratio=ratio, schedule=schedule)
    assert is_drawn(SourceConfig(path="x", ratio=ratio, schedule=schedule)) == any(points.values())
    before = max(at for at in points if at <= step)
    after = min((at for at in points if at > step), default=None)
    assert ratio_at(points, step, between=Interpolation.steps) == points[before]
    linear = ratio_at(points, step, between=Interpolation.linear)
    if after is None or before == step:
        assert linear == points[before]
    else:
        low, high = sorted((points[before], points[after]))
        assert low - 1e-9 <= linear <= high + 1e-9


@given(schedule=schedules)
def test_a_schedule_survives_the_file_of_a_run(schedule: dict[int, float]) -> None:
    config = RunConfig(data=TokenDataConfig(sources={"a": SourceConfig(path="x")}))
    config.data.sources["a"].schedule = schedule  # type: ignore[attr-defined]
    misfits: Misfits = {}
    again = build(with_defaults(to_plain(config)), misfits=misfits)
    assert not misfits
    assert again == config


def test_a_point_of_a_schedule_is_a_step() -> None:
    tree = to_plain(RunConfig(data=TokenDataConfig(sources={"a": SourceConfig(path="x")})))
    tree["data"]["sources"]["a"]["schedule"] = {"soon": 0.5, 3: "much"}
    misfits: Misfits = {}
    assert build(with_defaults(tree), misfits=misfits) is None
    assert list(misfits.values()) == [
        "data.sources.a.schedule has an entry 'soon'; expected integers, as in {1000: 0.5}",
        "data.sources.a.schedule.3='much' is a string; expected a number",
    ]
