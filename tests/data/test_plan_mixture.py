"""What the mixture may be told: ends, schedules, documents in pieces; against the plain planner."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_plan import plain_plan
from test_plan import items_of, paper_mixture, planned

from emu35.config.data import Interpolation, Packing
from emu35.data.pack import Item
from emu35.data.plan import Planner, Sample
from emu35.data.planned import PlannedSource
from emu35.errors import DataError

ROW, BINS, WINDOW = 64, 3, 8

documents = st.lists(st.lists(st.integers(1, ROW), min_size=1, max_size=3), min_size=1, max_size=25)
"""Documents as the lengths of their pieces."""


def source_of(name: str, pieces: list[list[int]], **settings: Any) -> PlannedSource:
    """Two shards, the first third of the documents in the first."""
    counts = [len(lengths) for lengths in pieces]
    first = sum(counts[: len(counts) // 3])
    return PlannedSource(
        name=name,
        length=np.array([length for lengths in pieces for length in lengths], np.int64),
        per_shard=np.array([first, sum(counts) - first], np.int64),
        document=np.repeat(np.arange(len(pieces)), counts),
        fingerprint="f",
        **{"ratio": 1.0, **settings},
    )


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a planner, with whatever a mixture may be told."""
    ratio = st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0])
    sources = [
        source_of(
            name,
            draw(documents),
            ratio=draw(ratio),
            schedule=draw(st.dictionaries(st.integers(0, 6), ratio, max_size=3)),
            epochs=draw(st.none() | st.sampled_from([0.3, 1.0, 2.5])),
            max_tokens=draw(st.none() | st.integers(1, 2000)),
            packing=draw(st.sampled_from([Packing.online, Packing.online, Packing.offline])),
        )
        for name in "abc"[: draw(st.integers(1, 3))]
    ]
    return {
        "sources": sources,
        "seed": draw(st.integers(0, 3)),
        "between": draw(st.sampled_from(list(Interpolation))),
        "samples_per_step": draw(st.integers(1, 4)),
    }


def planner_of(mixture: dict[str, Any]) -> Planner:
    return Planner(**mixture, sequence_length=ROW, open_bins=BINS, shuffle_window=WINDOW)


def all_of(planner: Planner, *, most: int) -> list[Sample]:
    """Samples up to the end of the data, one at a time."""
    samples: list[Sample] = []
    while len(samples) < most:
        try:
            samples += planner.take(1)
        except DataError:
            break
    return samples


@settings(deadline=None)
@given(mixture=mixtures())
def test_the_stream_is_what_the_rules_say(mixture: dict[str, Any]) -> None:
    expected = plain_plan(**mixture, row=ROW, open_bins=BINS, window=WINDOW, most=40)
    found = all_of(planner_of(mixture), most=40)
    assert [[tuple(item) for item in sample.items] for sample in found] == expected
    if expected:
        whole = planner_of(mixture).take(len(expected))
        assert whole == found


@settings(deadline=None)
@given(mixture=mixtures(), cuts=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_a_state_at_any_point_goes_on_identically(mixture: dict[str, Any], cuts: list[int]) -> None:
    """Through JSON, with schedules, ended sources, half-used documents and whatever else."""
    expected = all_of(planner_of(mixture), most=sum(cuts) + 12)
    planner, found = planner_of(mixture), list[Sample]()
    for cut in cuts:
        cut = min(cut, len(expected) - len(found))
        if cut:
            found += planner.take(cut)
        state = json.loads(json.dumps(planner.state_dict(), sort_keys=True))
        planner = planner_of(mixture)
        if len(expected) > 2:
            planner.take(2)
        planner.load_state_dict(state)
        assert planner.state_dict() == state
    found += all_of(planner, most=len(expected) - len(found))
    assert found == expected


@settings(deadline=None)
@given(
    one=documents,
    two=documents,
    seed=st.integers(0, 3),
    passes=st.integers(1, 2),
    packing=st.sampled_from(list(Packing)),
)
def test_everything_comes_out_as_often_as_it_may_and_is_counted(
    one: list[list[int]], two: list[list[int]], seed: int, passes: int, packing: Packing
) -> None:
    """Every token of every document, what lies in open bins when its source ends included."""
    sources = [
        source_of("a", one, epochs=float(passes), ratio=0.2),
        source_of("b", two, epochs=float(passes), packing=packing),
    ]
    planner = planner_of({"sources": sources, "seed": seed})
    samples = all_of(planner, most=10_000)
    seen = Counter(items_of(samples))
    for number, source in enumerate(sources):
        assert all(seen[Item(number, item)] == passes for item in range(len(source.length)))
        counts = planner.counts()
        assert counts[f"tokens/{source.name}"] == passes * int(source.length.sum())
        assert counts[f"documents/{source.name}"] == passes * len((one, two)[number])
        assert counts[f"epoch/{source.name}"] == passes
    assert sum(seen.values()) == passes * sum(len(source.length) for source in sources)
    assert len(planner.notes) == 2
    assert f"source 'a' ended after {passes} epochs" in " ".join(planner.notes)


@settings(deadline=None)
@given(pieces=documents, seed=st.integers(0, 3))
def test_pieces_of_a_document_are_drawn_one_after_the_other(
    pieces: list[list[int]], seed: int
) -> None:
    # Rows of which each holds a single piece show the order of drawing.
    source = source_of("a", [[ROW for _ in lengths] for lengths in pieces], epochs=1.0)
    items = items_of(all_of(planner_of({"sources": [source], "seed": seed}), most=10_000))
    assert source.document is not None
    drawn = [int(source.document[item]) for _, item in items]
    order = list(dict.fromkeys(drawn))
    assert drawn == [document for document in order for _ in pieces[document]]
    assert sorted(item for _, item in items) == list(range(len(items)))
    for document in order:
        own = [item for _, item in items if source.document[item] == document]
        assert own == sorted(own)


def shares_of(samples: list[Sample], sources: list[PlannedSource]) -> np.ndarray:
    tokens = np.zeros(len(sources))
    for source, item in items_of(samples):
        tokens[source] += sources[source].length[item]
    return tokens / tokens.sum()


def paper_planner(sources: list[PlannedSource], **settings: Any) -> Planner:
    return Planner(
        sources=sources,
        sequence_length=32768,
        open_bins=16,
        shuffle_window=4096,
        seed=1,
        **settings,
    )


def test_a_changed_ratio_holds_from_its_step_on() -> None:
    """The paper's mixture of stage 1 becomes that of its text at a half."""
    later = {"a_text": 0.5, "b_caption": 0.0, "c_video": 0.1, "d_interleaved": 0.4}
    sources = [
        replace(source, schedule={1000: later[source.name]})
        for source in paper_mixture(8_000_000, seed=0)
    ]
    planner = paper_planner(sources)
    first = planner.take(1000)
    np.testing.assert_allclose(shares_of(first, sources), [0.2, 0.2, 0.05, 0.55], atol=0.005)
    planner.take(16)  # what lay in open bins
    second = planner.take(1000)
    np.testing.assert_allclose(shares_of(second, sources), list(later.values()), atol=0.005)


def test_a_linear_schedule_moves_from_point_to_point() -> None:
    sources = paper_mixture(8_000_000, seed=0)
    sources[0] = replace(sources[0], ratio=0.0, schedule={0: 0.0, 100: 0.8})
    sources[3] = replace(sources[3], schedule={0: 0.55, 100: 0.0})
    planner = paper_planner(sources, between=Interpolation.linear, samples_per_step=10)
    shares = [shares_of(planner.take(250), sources) for _ in range(5)]
    text = [float(share[0]) for share in shares]
    assert text == sorted(text)
    # Halfway through the first quarter, 0.1 of 0.8 against 0.48 + 0.25 of the others.
    np.testing.assert_allclose(text[0], 0.1 / (0.1 + 0.25 + 0.55 * 0.875), atol=0.02)
    np.testing.assert_allclose(text[4], 0.8 / 1.05, atol=0.02)
    assert shares[4][3] < 0.01


def test_an_ended_source_leaves_its_share_to_the_others() -> None:
    sources = paper_mixture(8_000_000, seed=0)
    sources[3] = replace(sources[3], max_tokens=9_000_000)
    planner = paper_planner(sources)
    planner.take(700)
    (note,) = planner.notes
    assert "source 'd_interleaved' ended after" in note
    counted = planner.counts()["tokens/d_interleaved"]
    assert 9_000_000 - 32768 < counted <= 9_000_000
    after = shares_of(planner.take(600), sources)
    np.testing.assert_allclose(after, np.array([0.2, 0.2, 0.05, 0]) / 0.45, atol=0.005)


def test_the_end_of_all_data_is_explained() -> None:
    sources = [planned("a", [30] * 8), planned("b", [20] * 9)]
    limited = [replace(sources[0], epochs=2.0), replace(sources[1], max_tokens=100)]
    planner = planner_of({"sources": limited, "seed": 0})
    with pytest.raises(DataError) as caught:
        planner.take(50)
    for words in (
        "source 'a' ended after 2 epochs (480 tokens) before sample",
        "source 'b' ended after 0.5556 epochs (100 tokens) before sample",
        "raise data.sources.NAME.epochs or max_tokens, add a source, or lower stage.steps",
    ):
        assert words in str(caught.value)
    assert planner.available == 580


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 2.0}, "epochs of source 'a' was None and is 2.0"),
        ({"max_tokens": 9}, "max_tokens of source 'a' was None and is 9"),
        ({"filter": "min_tokens=5"}, "filter of source 'a' was none and is min_tokens=5"),
        ({"schedule": {3: 0.5}}, r"schedule of source 'a' was \[\] and is \[\[3, 0.5\]\]"),
    ],
)
def test_a_state_of_another_mixture_is_refused(change: dict[str, Any], words: str) -> None:
    source = planned("a", [5, 6, 7])
    state = json.loads(json.dumps(planner_of({"sources": [source], "seed": 0}).state_dict()))
    changed = planner_of({"sources": [replace(source, **change)], "seed": 0})
    with pytest.raises(DataError, match=words):
        changed.load_state_dict(state)


def test_a_schedule_in_steps_of_another_size_is_refused() -> None:
    sources = [planned("a", [5, 6]), replace(planned("b", [7]), schedule={2: 0.5})]
    state = planner_of({"sources": sources, "seed": 0, "samples_per_step": 8}).state_dict()
    changed = planner_of({"sources": sources, "seed": 0, "samples_per_step": 4})
    with pytest.raises(DataError, match="samples_per_step was 8 and is 4"):
        changed.load_state_dict(state)


def test_an_epoch_of_the_paper_mixture_is_dense() -> None:
    """With every document once: the rows that are left half full at the end included."""
    sources = [replace(source, epochs=1.0) for source in paper_mixture(16_000_000, seed=2)]
    planner = paper_planner(sources)
    samples = all_of(planner, most=10_000)
    assert Counter(items_of(samples)).total() == sum(len(source.length) for source in sources)
    filled = planner.tokens / (len(samples) * 32768)
    assert filled >= 0.98
    whole = samples[: -2 * 16]
    used = sum(int(sources[source].length[item]) for source, item in items_of(whole))
    assert used / (len(whole) * 32768) >= 0.995


def test_the_state_of_twenty_sources_is_small() -> None:
    sources = [
        replace(source, name=f"{source.name}_{copy}", schedule={10: 0.5, 1000: 0.1}, epochs=3.0)
        for source in paper_mixture(2_000_000, seed=0)
        for copy in range(5)
    ]
    planner = paper_planner(sorted(sources, key=lambda source: source.name))
    for _ in range(5):
        planner.take(50)
        assert len(json.dumps(planner.state_dict(), indent=1)) < 64_000
