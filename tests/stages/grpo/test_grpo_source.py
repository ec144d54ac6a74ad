"""Prompts to requests: the behaviour policy, seeds, rows, and what is refused before a model is
read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prompt_files import write
from tiny_source import CODES, write_run

from emu35.config import GRPOConfig, LMConfig, PromptDataConfig, RunConfig, SFTConfig
from emu35.config.grpo import EvaluationConfig, RolloutConfig
from emu35.config.prompts import PromptTaskConfig
from emu35.config.reward_kinds import REWARD_KINDS
from emu35.config.tokenizer import TokenizerConfig
from emu35.data.scenes.corpus import sample_prompts
from emu35.errors import ConfigError, DataError
from emu35.inference.request import Request
from emu35.stages.grpo.requests import answer_seed, row_tokens
from emu35.stages.grpo.sampling import Asked
from emu35.stages.grpo.source import Due, PromptSource
from emu35.tokens.template import Sampling

POSITIONS = 900


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("source"), positions=POSITIONS, stage=SFTConfig())


def configured(
    run: Path,
    tasks: Mapping[str, PromptTaskConfig],
    *,
    validation: Mapping[str, PromptTaskConfig] | None = None,
    length: int = POSITIONS,
    guidance: float = 1.0,
    seed: int = 3,
) -> RunConfig:
    stage = GRPOConfig(
        init_from=str(run),
        prompts_per_step=4,
        rollouts_per_prompt=3,
        rollout=RolloutConfig(guidance=guidance, temperature=0.9, top_k=7, text_top_p=0.8),
        evaluation=EvaluationConfig(guidance=4.0, samples=2, max_prompts=2),
        rewards={"scene": REWARD_KINDS["scene"]()},
    )
    return RunConfig(
        seed=seed,
        model=LMConfig(max_position_embeddings=POSITIONS),
        tokenizer=TokenizerConfig(codebook_size=CODES, vision=str(run.parent / "vision")),
        data=PromptDataConfig(
            sequence_length=length, tasks=dict(tasks), validation=dict(validation or {})
        ),
        stage=stage,
    )


def scenes(path: Path, *, count: int = 6, **changes: Any) -> PromptTaskConfig:
    """A task of captions."""
    records = [{**each, "prompt": "a dot"} for each in sample_prompts(count=count, seed=4)]
    task = PromptTaskConfig(path=str(write(path, records)), size="3x4", rewards={"scene": 1.0})
    return replace(task, **changes)


def asked_of(source: PromptSource, due: Sequence[Due]) -> list[Asked]:
    return [source.asked(each, codes=source.codes(each)) for each in due]


def seeds(due: Sequence[Due]) -> list[list[int]]:
    return [list(each.seeds) for each in due]


def told(request: Request) -> Any:
    return (list(request.prompt), request.max_new_tokens, request.guidance, request.grammar)


def test_requests_follow_the_policy_and_differ_in_their_seeds_alone(
    run: Path, tmp_path: Path
) -> None:
    source = PromptSource.open(configured(run, {"t2i": scenes(tmp_path / "t2i.jsonl")}))
    due = source.take(8)
    asked = asked_of(source, due)
    assert [each.serial for each in asked] == list(range(8))
    assert {each.prompt.number for each in asked[:6]} == set(range(6))
    for each in asked:
        assert each.prompt.id.startswith("t2i.jsonl:")
        assert len(each.requests) == 3
        assert len({str(told(request)) for request in each.requests}) == 1
        request = each.requests[0]
        assert request.visual == Sampling(temperature=0.9, top_k=7, top_p=1.0)
        assert request.text == Sampling(temperature=1.0, top_k=0, top_p=0.8)
        assert request.guidance == 1.0
        assert request.keep_candidates
        assert request.grammar.size is not None
        assert str(request.grammar.size).startswith("3")
    every = [request.seed for each in asked for request in each.requests]
    assert every == [seed for group in seeds(due) for seed in group]
    assert len(set(every)) == 24, "a prompt that comes again is answered otherwise"


def test_two_ranks_and_a_resumed_run_ask_the_same(run: Path, tmp_path: Path) -> None:
    tasks = {
        "one": scenes(tmp_path / "one.jsonl", ratio=2.0),
        "two": scenes(tmp_path / "two.jsonl", count=5),
    }
    source, other = (PromptSource.open(configured(run, tasks)) for _ in range(2))
    first = source.take(7)
    assert seeds(other.take(7)) == seeds(first)
    state = json.loads(json.dumps(source.state_dict()))
    expected = source.take(9)
    resumed = PromptSource.open(configured(run, tasks))
    resumed.load_state_dict(state)
    again = resumed.take(9)
    assert seeds(again) == seeds(expected)
    assert [each.prompt.id for each in again] == [each.prompt.id for each in expected]
    reseeded = PromptSource.open(configured(run, tasks, seed=4)).take(7)
    assert not {seed for group in seeds(first) for seed in group} & {
        seed for group in seeds(reseeded) for seed in group
    }


def test_validation_is_asked_alike_each_time_under_a_policy_of_its_own(
    run: Path, tmp_path: Path
) -> None:
    task = scenes(tmp_path / "t2i.jsonl")
    # A row too short for guidance matters to what is trained on alone.
    config = configured(run, {"x": task}, validation={"x": task}, length=100)
    source = PromptSource.open(config)
    found = source.validation["x"]
    assert [each.prompt.number for each in found] == [0, 1]
    asked = asked_of(source, found)
    assert {request.guidance for each in asked for request in each.requests} == {4.0}
    assert all(len(each.requests) == 2 for each in asked)
    # Nothing is replayed, so nobody has to say what top-k left.
    assert not any(request.keep_candidates for each in asked for request in each.requests)
    trained = source.take(6)
    assert seeds(source.validation["x"]) == seeds(found)
    assert not {seed for group in seeds(found) for seed in group} & {
        seed for group in seeds(trained) for seed in group
    }


def test_references_are_codes_of_the_size_that_the_task_asks_for(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    record = {"prompt": "again", "images": ["red.png"], **sample_prompts(count=1, seed=4)[0]}
    path = write(tmp_path / "x2i.jsonl", [record])
    task = PromptTaskConfig(
        path=str(path), task="x2i", rewards={"scene": 1.0}, image_area=32, max_new_tokens=60
    )
    source = PromptSource.open(configured(run, {"edits": task}))
    (asked,) = asked_of(source, source.take(1))
    (codes_HW,) = asked.prompt.references
    assert codes_HW.shape == (2, 4)
    assert codes_HW.dtype.kind == "i"
    grammar = asked.requests[0].grammar
    assert grammar.size is not None
    assert (grammar.size.height, grammar.size.width) == (2, 4)
    huge = replace(task, image_area=None)
    with pytest.raises(ConfigError, match=r"x2i\.jsonl, line 1|positions"):
        PromptSource.open(configured(run, {"edits": huge}))
    (tmp_path / "red.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"line 1: reference image .*red\.png"):
        PromptSource.open(configured(run, {"edits": task}))


def test_pictures_are_read_by_who_asks_and_once(run: Path, tmp_path: Path) -> None:
    """Taking a prompt reads no picture, and asking it again reads none either."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    records = [
        {"prompt": "again", "images": ["red.png"], **scene}
        for scene in sample_prompts(count=2, seed=4)
    ]
    path = write(tmp_path / "x2i.jsonl", records)
    task = PromptTaskConfig(
        path=str(path), task="x2i", rewards={"scene": 1.0}, image_area=32, max_new_tokens=60
    )
    source = PromptSource.open(configured(run, {"edits": task}))
    first = source.codes(source.take(1)[0])
    (tmp_path / "red.png").unlink()
    due = source.take(3)
    for each in asked_of(source, due):
        np.testing.assert_array_equal(each.prompt.references, first)
    other = replace(due[0], task=replace(task, image_area=16))
    with pytest.raises(DataError, match=r"red\.png"):
        source.codes(other)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_answer_fits_its_row_with_all_its_streams(
    run: Path, tmp_path: Path, guidance: float
) -> None:
    # Free text and pictures, of which a task would allow more than the row holds.
    task = scenes(tmp_path / "story.jsonl", task="story", size=None, count=1)
    config = configured(run, {"s": task}, length=160, guidance=guidance)
    source = PromptSource.open(config)
    (asked,) = asked_of(source, source.take(1))
    request = asked.requests[0]
    assert len(request.prompts) == (1 if guidance == 1.0 else 2)
    assert 160 - len(request.prompts) < row_tokens(request) <= 160
    roomy = configured(run, {"s": task}, length=10_000, guidance=guidance)
    source = PromptSource.open(roomy)
    (asked,) = asked_of(source, source.take(1))
    longest = max(map(len, asked.requests[0].prompts))
    assert asked.requests[0].max_new_tokens + longest == POSITIONS


@pytest.mark.parametrize(
    ("changes", "length", "said"),
    [
        ({"max_new_tokens": 80}, 130, r"data.sequence_length=130 leaves \d\d tokens .*have 80;"),
        ({"size": "9x9"}, 130, r"data.sequence_length=130 leaves \d\d tokens .*9\*9 codes has"),
        ({"size": "40x40"}, 10_000, r"40\*40 codes has \d+ tokens, but only"),
        ({"max_new_tokens": 880}, 10_000, "of the model's positions"),
        ({"size": "3x4"}, 3, "data.sequence_length=3 leaves 0 tokens"),
    ],
)
def test_what_does_not_fit_is_named_before_a_weight_is_read(
    run: Path, tmp_path: Path, changes: dict[str, Any], length: int, said: str
) -> None:
    task = scenes(tmp_path / "t2i.jsonl", **changes)
    with pytest.raises(ConfigError, match=said):
        PromptSource.open(configured(run, {"t2i": task}, length=length))


def test_both_sections_are_checked_and_named(run: Path, tmp_path: Path) -> None:
    lacking = PromptTaskConfig(
        path=str(write(tmp_path / "none.jsonl", [{"prompt": "x"}])), rewards={"scene": 1.0}
    )
    with pytest.raises(ConfigError) as caught:
        PromptSource.open(configured(run, {"a": lacking}, validation={"b": lacking}))
    said = "\n".join(caught.value.problems)
    assert "data.tasks.a: reward" in said
    assert "data.validation.b: reward" in said


def test_seeds_of_neighbours_have_nothing_in_common() -> None:
    found = {
        answer_seed(seed, task=task, number=number, serial=serial, sample=sample)
        for seed in range(3)
        for task in ("a", "b", "validation/a")
        for number in range(4)
        for serial in range(4)
        for sample in range(4)
    }
    assert len(found) == 3 * 3 * 4 * 4 * 4
    bits = np.array([[seed >> at & 1 for at in range(63)] for seed in found])
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.1)
