"""What is saved comes back in every bit, or is said to be missing or damaged."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from emu35.errors import DataError
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import Finish
from emu35.stages.grpo.archive import archived_steps, read_groups, write_groups
from emu35.stages.grpo.types import Behaviour, Group, Prompt, Rollout, Scores
from emu35.tokens.template import Sampling

NAMES = st.text(max_size=6)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.integers(0, 2**31 - 1)


def ids(length: st.SearchStrategy[int] | int) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.int32, length, elements=IDS)


SAMPLINGS = st.builds(Sampling, top_k=st.integers(0, 9), top_p=NUMBERS, temperature=NUMBERS)
BEHAVIOURS = st.builds(
    Behaviour,
    text=SAMPLINGS,
    visual=SAMPLINGS,
    guidance=NUMBERS,
    grammar=st.builds(
        GrammarOptions,
        size=st.none() | st.builds(GridSize, height=st.integers(1, 99), width=st.integers(1, 99)),
        same_size=st.booleans(),
        open_image=st.booleans(),
        min_digits=st.integers(1, 2),
    ),
    max_new_tokens=st.integers(1, 9999),
    max_images=st.integers(1, 9),
)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    tokens = draw(st.integers(0, 5))
    some = ids(st.integers(0, 4)).map(np.sort)
    kept = draw(st.lists(st.none() | some, min_size=tokens, max_size=tokens))
    return Rollout(
        prompt_ids=draw(ids(st.integers(0, 4))),
        unconditional_ids=draw(ids(st.integers(0, 4))),
        behaviour=draw(BEHAVIOURS),
        seed=draw(st.integers(0, 2**64 - 1)),
        step=draw(st.integers(1, 10**9)),
        ids=draw(ids(tokens)),
        # -inf and denormal numbers included.
        logprobs=draw(arrays.arrays(np.float32, tokens, elements=st.floats(width=32))),
        support=draw(ids(tokens)),
        kinds=draw(arrays.arrays(np.uint8, tokens, elements=st.integers(0, 3))),
        finish=draw(st.sampled_from(Finish)),
        candidates=tuple(draw(st.sampled_from([(), kept]))),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
PROMPTS = st.builds(
    Prompt,
    task=NAMES,
    number=st.integers(0, 10**6),
    id=NAMES,
    record=st.dictionaries(NAMES, JSON, max_size=3),
    references=st.lists(
        arrays.arrays(
            st.sampled_from([np.int32, np.int64, np.uint16]),
            arrays.array_shapes(min_dims=2, max_dims=2, max_side=3),
        ),
        max_size=2,
    ).map(tuple),
)
SCORES = st.builds(
    Scores,
    raw=st.dictionaries(NAMES, NUMBERS, max_size=2),
    mapped=st.dictionaries(NAMES, NUMBERS, max_size=2),
    clamped=st.frozensets(NAMES, max_size=2),
    unscored=st.dictionaries(NAMES, NAMES, max_size=2),
    total=st.none() | NUMBERS,
)
GROUPS = st.lists(
    st.builds(
        Group,
        prompt=PROMPTS,
        rollouts=st.lists(rollouts(), max_size=2).map(tuple),
        scores=st.lists(SCORES, max_size=2).map(tuple),
    ),
    max_size=3,
)


def plain(value: Any) -> Any:
    """Something that is equal only where every bit, dtype and shape is."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return repr(sorted(value) if isinstance(value, frozenset) else value)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(GROUPS, min_size=1, max_size=3))
def test_round_trip_is_exact_over_any_number_of_ranks(
    tmp_path: Path, parts: list[list[Group]]
) -> None:
    """Files of an earlier example, by as many or more ranks, are replaced or ignored."""
    for rank, groups in enumerate(parts):
        write_groups(groups, folder=tmp_path, step=7, rank=rank, ranks=len(parts))
    found = read_groups(tmp_path, step=7)
    assert plain(found) == plain([group for groups in parts for group in groups])


def group(number: int = 0, *, tokens: int = 40) -> Group:
    draw = np.random.default_rng(number)
    rollout = Rollout(
        prompt_ids=np.arange(5, dtype=np.int32),
        unconditional_ids=np.empty(0, np.int32),
        behaviour=Behaviour(
            text=Sampling(top_k=0, top_p=1.0, temperature=1.0),
            visual=Sampling(top_k=0, top_p=1.0, temperature=1.0),
            guidance=1.0,
            grammar=GrammarOptions(size=GridSize(height=8, width=8)),
            max_new_tokens=100,
            max_images=1,
        ),
        seed=number,
        step=1,
        ids=draw.integers(0, 1000, tokens).astype(np.int32),
        logprobs=-draw.random(tokens).astype(np.float32),
        support=np.full(tokens, 256, np.int32),
        kinds=np.full(tokens, 3, np.uint8),
        finish=Finish.images,
    )
    prompt = Prompt(task="scenes", number=number, id=str(number), record={"prompt": "a red disc"})
    return Group(serial=number, prompt=prompt, rollouts=(rollout,), scores=(Scores(total=4.5),))


def test_a_missing_step_names_those_there_are(tmp_path: Path) -> None:
    for step in (3, 12):
        write_groups([group()], folder=tmp_path, step=step)
    assert archived_steps(tmp_path) == [3, 12]
    with pytest.raises(DataError, match=r"step_00000004.*are: 3, 12"):
        read_groups(tmp_path, step=4)
    with pytest.raises(DataError, match=r"no folder.*stage\.rollout\.save=true"):
        archived_steps(tmp_path / "elsewhere")


def _cut_arrays(meta: Path) -> None:
    arrays_file = meta.with_suffix(".npz")
    arrays_file.write_bytes(arrays_file.read_bytes()[:-7])


def _flip_a_bit(meta: Path) -> None:
    arrays_file = meta.with_suffix(".npz")
    content = bytearray(arrays_file.read_bytes())
    content[len(content) // 2] ^= 1
    arrays_file.write_bytes(content)


def _cut_lines(meta: Path) -> None:
    meta.write_text("\n".join(meta.read_text().splitlines()[:-1]) + "\n")


def _cut_a_line(meta: Path) -> None:
    meta.write_text(meta.read_text()[:-20])


def _change_head(meta: Path, **changes: Any) -> None:
    head, *rest = meta.read_text().splitlines()
    meta.write_text("\n".join([json.dumps({**json.loads(head), **changes}), *rest]) + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_arrays, "rank_00000.npz is not what was written"),
        (_flip_a_bit, "rank_00000.npz is not what was written"),
        (lambda meta: meta.with_suffix(".npz").unlink(), "No such file"),
        (_cut_lines, "1 groups instead of 2"),
        (_cut_a_line, "is damaged or unfinished"),
        (lambda meta: meta.write_text(""), "is damaged or unfinished"),
        (lambda meta: meta.write_text("[1]\n"), "does not begin with a line that describes"),
        (lambda meta: _change_head(meta, version=2), "version 2, this emu35 reads 1"),
        (lambda meta: _change_head(meta, step=6), "holds rank 0 of step 6"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    meta = write_groups([group(0), group(1)], folder=tmp_path, step=5)
    damage(meta)
    with pytest.raises(DataError, match=message) as caught:
        read_groups(tmp_path, step=5)
    assert str(meta) in str(caught.value)
    assert "sample step 5 again" in str(caught.value)
    # Sampling it again mends it.
    write_groups([group(2)], folder=tmp_path, step=5)
    assert plain(read_groups(tmp_path, step=5)) == plain([group(2)])


def test_a_rank_that_is_missing_or_of_another_run_is_named(tmp_path: Path) -> None:
    write_groups([group(0)], folder=tmp_path, step=5, rank=0, ranks=2)
    with pytest.raises(DataError, match="rank_00001"):
        read_groups(tmp_path, step=5)
    write_groups([group(1)], folder=tmp_path, step=5, rank=1, ranks=4)
    with pytest.raises(DataError, match=r"rank_00001\.jsonl was written by 4 ranks.*by 2"):
        read_groups(tmp_path, step=5)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        write_groups([group()], folder=blocked, step=1)


def test_candidates_of_whole_pictures_stay_small(tmp_path: Path) -> None:
    """Top-k 5120 of 131,072 for every code of a picture: differences of sorted ids compress to
    well under two of their four bytes."""
    draw = np.random.default_rng(0)
    kept = tuple(
        np.sort(draw.choice(131072, 5120, replace=False)).astype(np.int32) for _ in range(40)
    )
    whole = group()
    rollout = whole.rollouts[0]
    values = {each.name: getattr(rollout, each.name) for each in fields(rollout)}
    with_candidates = Rollout(**{**values, "candidates": kept})
    saved = Group(serial=9, prompt=whole.prompt, rollouts=(with_candidates,), scores=whole.scores)
    meta = write_groups([saved], folder=tmp_path, step=1)
    assert meta.with_suffix(".npz").stat().st_size < 2 * 5120 * 40
    assert plain(read_groups(tmp_path, step=1)) == plain([saved])
