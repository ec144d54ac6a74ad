"""The plan of prompts: exact shares, whole epochs, and a place that is found again."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_files import numbered, write

from emu35.config.prompts import PromptTaskConfig
from emu35.errors import CheckpointError
from emu35.stages.grpo.plan import PlannedPrompt, PromptPlan
from emu35.stages.grpo.prompts import TaskPrompt, read_tasks

Tasks = Mapping[str, Sequence[TaskPrompt]]
RATIOS = {"a": 3.0, "b": 1.0, "c": 0.5, "off": 0.0}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return numbered(tmp_path_factory.mktemp("plan"), {"a": 7, "b": 5, "c": 4, "off": 2})


def plan_of(tasks: Tasks, *, ratios: Mapping[str, float] = RATIOS, seed: int = 1) -> PromptPlan:
    return PromptPlan(tasks, ratios=ratios, seed=seed)


def names(planned: Sequence[PlannedPrompt]) -> list[tuple[str, int, int, int]]:
    return [(each.prompt.task, each.prompt.number, each.epoch, each.serial) for each in planned]


@given(ratios=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), count=st.integers(1, 200))
def test_no_count_is_ever_a_whole_prompt_off_its_share(
    tasks: Tasks, ratios: list[float], count: int
) -> None:
    same = {str(number): tasks["a"] for number in range(len(ratios))}
    plan = plan_of(same, ratios={str(n): ratio for n, ratio in enumerate(ratios)})
    given: Counter[str] = Counter()
    total = sum(map(Fraction, ratios))
    for drawn in range(1, count + 1):
        (one,) = plan.take(1)
        # The plan counts what it gives out, whatever task the prompt was read for.
        given = Counter({n: plan.state_dict()["tasks"][n]["given"] for n in same})
        assert one.serial == drawn - 1
        for number, ratio in enumerate(ratios):
            assert abs(given[str(number)] - drawn * Fraction(ratio) / total) < 1
    assert sum(given.values()) == count


@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_the_size_of_batches_changes_nothing(tasks: Tasks, cuts: list[int]) -> None:
    plan, whole = plan_of(tasks), plan_of(tasks)
    pieces = [each for cut in cuts for each in plan.take(cut)]
    assert names(pieces) == names(whole.take(sum(cuts)))


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own(tasks: Tasks) -> None:
    drawn = plan_of(tasks).take(90)
    assert {each.prompt.task for each in drawn} == {"a", "b", "c"}
    orders: dict[int, list[int]] = {}
    for each in drawn:
        if each.prompt.task == "a":
            orders.setdefault(each.epoch, []).append(each.prompt.number)
    whole = [order for order in orders.values() if len(order) == 7]
    assert len(whole) >= 7
    assert all(sorted(order) == list(range(7)) for order in whole)
    assert len({tuple(order) for order in whole}) == len(whole)


def test_the_order_of_a_task_depends_on_seed_task_and_epoch_alone(tasks: Tasks) -> None:
    def order(plan: PromptPlan, name: str) -> list[int]:
        return [each.prompt.number for each in plan.take(60) if each.prompt.task == name][:10]

    first = order(plan_of(tasks), "a")
    assert order(plan_of({"a": tasks["a"]}, ratios={"a": 2.0}), "a") == first
    assert order(plan_of(tasks, ratios={**RATIOS, "c": 4.0}), "a") == first
    assert order(plan_of(tasks, seed=2), "a") != first


@given(before=st.integers(0, 60), after=st.integers(1, 40))
def test_a_place_is_found_again_within_an_epoch(tasks: Tasks, before: int, after: int) -> None:
    plan = plan_of(tasks)
    plan.take(before)
    state = json.loads(json.dumps(plan.state_dict()))
    again = plan_of(tasks)
    again.take(3)
    again.load_state_dict(state)
    assert names(again.take(after)) == names(plan.take(after))


def test_a_place_in_other_prompts_is_refused_and_nothing_moves(
    tasks: Tasks, tmp_path: Path
) -> None:
    plan = plan_of(tasks)
    plan.take(11)
    state = plan.state_dict()
    records = [dict(each.record) for each in tasks["b"]]
    path = write(tmp_path / "b.jsonl", [*records, {"prompt": "one more"}])
    changed = {**tasks, **read_tasks({"b": PromptTaskConfig(path=str(path))}, rewards={})}
    other = plan_of(changed, ratios={**RATIOS, "a": 2.0}, seed=4)
    before = other.state_dict()
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(state)
    for part in (
        "the file of task b changed (5 prompts then, 6 now)",
        "the ratio of task a was 3.0 and is 2.0",
        "seed was 1 and is 4",
        "stage.init_from",
    ):
        assert part in str(caught.value)
    assert "task c" not in str(caught.value)
    assert other.state_dict() == before
    fewer = {name: tasks[name] for name in ("a", "b")}
    with pytest.raises(CheckpointError, match=r"tasks were \['a', 'b', 'c'\] and are \['a', 'b'\]"):
        plan_of(fewer, ratios={"a": 3.0, "b": 1.0}).load_state_dict(state)
