"""How much of a codebook is used, against plain counting."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from emu35.data.codes.usage import Usage, usage_of, write_report
from emu35.errors import DataError

SIZE = 16
GRIDS = st.lists(
    arrays.arrays(
        np.uint32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements=st.integers(0, SIZE - 1),
    ),
    max_size=6,
)


def usage_from(grids: list[npt.NDArray[np.uint32]]) -> Usage:
    usage = Usage.none(SIZE)
    for grid in grids:
        usage.add(grid)
    return usage


@given(grids=GRIDS)
def test_it_is_what_plain_counting_gives(grids: list[npt.NDArray[np.uint32]]) -> None:
    usage = usage_from(grids)
    counts = Counter(int(code) for grid in grids for code in grid.flatten())
    assert usage.codes == counts.total()
    assert (usage.used, usage.pictures) == (len(counts), len(grids))
    assert usage.share == len(counts) / SIZE
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    assert math.isclose(usage.perplexity, math.exp(entropy) if counts else 0.0)
    assert usage.top() == sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert usage.grids == Counter("x".join(map(str, grid.shape)) for grid in grids)


@pytest.mark.parametrize("used", [1, 4, SIZE])
def test_perplexity_of_evenly_used_codes_is_their_number(used: int) -> None:
    usage = usage_from([np.arange(used, dtype=np.uint32)[None]] * 3)
    assert math.isclose(usage.perplexity, used)
    assert f"{used} of {SIZE} codes used ({used / SIZE:.1%}), perplexity {used}.0" in "\n".join(
        usage.lines()
    )


def test_notes_add_up_and_the_report_is_text_json_and_histogram(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grids = [rng.integers(0, SIZE // 2, (2, 3 + n % 2)).astype(np.uint32) for n in range(7)]
    for number, part in enumerate((grids[:3], grids[3:], [])):
        usage_from(part).write_note(tmp_path / f"{number}.jsonl")
    notes = [tmp_path / f"{number}.jsonl" for number in range(3)]
    usage, whole = usage_of(notes, codebook_size=SIZE), usage_from(grids)
    np.testing.assert_array_equal(usage.counts_K, whole.counts_K)
    assert usage.grids == whole.grids
    write_report(usage, folder=tmp_path)
    report = json.loads((tmp_path / "usage.json").read_text())
    np.testing.assert_array_equal(np.load(tmp_path / report["histogram"]), whole.counts_K)
    assert report["used"] == whole.used <= SIZE // 2
    assert report["grids"] == {"2x3": 4, "2x4": 3}
    assert report["top"][0] == {
        "code": int(whole.counts_K.argmax()),
        "count": int(whole.counts_K.max()),
    }
    assert "grids: 4 of 2x3, 3 of 2x4" in usage.lines()
    notes[0].write_text("{}")
    with pytest.raises(DataError, match=r"0\.jsonl.* cannot be read .*--replace"):
        usage_of(notes, codebook_size=SIZE)
