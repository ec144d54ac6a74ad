"""Files of prompts for reinforcement learning: read whole, or refused with all that is wrong."""

from pathlib import Path

import pytest
from PIL import Image
from prompt_files import Wants, write

from emu35.config.prompts import PromptTaskConfig
from emu35.errors import ConfigError
from emu35.inference.grammar import GridSize
from emu35.stages.grpo.prompts import fingerprint, read_tasks
from emu35.tokens.template import Task


def test_prompts_come_in_order_with_what_their_task_says(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    path = write(
        tmp_path / "edits.jsonl",
        [
            {"prompt": "make it red", "id": "red", "images": ["cat.png"], "mine": 3},
            {"prompt": "make it blue", "images": "cat.png", "size": "2x3", "task": "x2i"},
        ],
    )
    task = PromptTaskConfig(
        path=str(path), task="x2i", size="4x4", max_new_tokens=90, rewards={"a": 1.0}
    )
    found = read_tasks({"edits": task}, rewards={"a": Wants("prompt")})
    first, second = found["edits"]
    assert (first.task, first.number, first.id) == ("edits", 0, "edits.jsonl:1 red")
    assert first.record["mine"] == 3
    assert first.wish.task is Task.x2i
    assert first.wish.images == (tmp_path / "cat.png",)
    assert (first.wish.size, first.wish.max_new_tokens) == (GridSize(height=4, width=4), 90)
    assert second.wish.size == GridSize(height=2, width=3)
    (only,) = read_tasks({"edits": task}, rewards={"a": Wants("prompt")}, most=1)["edits"]
    assert only.record == first.record


def test_everything_wrong_with_all_files_is_said_at_once(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [{"prompt": "a cat", "text": "x"}])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"prompt": "a cat", "text": "AB", "guidance": 3, "top_k": 5}\n'
        "\n"
        '{"prompt": "a cat", "size": "0x3"}\n'
        "{not json\n"
        '{"prompt": "a dog", "promt": 1, "text": "CD"}\n'
    )
    unlit = write(
        tmp_path / "unlit.jsonl",
        [
            {"prompt": "a", "text": "A", "images": ["none.png"]},
            {"prompt": "a", "text": "A", "decoder": "dida"},
            {"prompt": "b"},
            {"prompt": "c", "text": "C", "seed": 3},
            {"prompt": "fine", "text": "F"},
        ],
    )
    empty = write(tmp_path / "empty.jsonl", [])
    rewards = {"words": Wants("text")}
    tasks = {
        name: PromptTaskConfig(path=str(path), held_out=["words"])
        for name, path in (
            ("good", good),
            ("bad", bad),
            ("unlit", unlit),
            ("empty", empty),
            ("gone", tmp_path / "gone.jsonl"),
        )
    }
    tasks["odd"] = PromptTaskConfig(path=str(good), task="t3i")
    with pytest.raises(ConfigError) as caught:
        read_tasks(tasks, rewards=rewards)
    said = "\n".join(caught.value.problems)
    for part in (
        f"data.tasks.bad: {bad}, line 3: size=",
        f"data.tasks.bad: {bad}, line 4: ",
        f"data.tasks.bad: {bad}, line 5: unknown key 'promt'. Did you mean 'prompt'?",
        f"data.tasks.unlit: {unlit}, line 1: image {tmp_path / 'none.png'} does not exist",
        f"data.tasks.unlit: {unlit}, line 2: decoder dida has no log-probabilities",
        f"data.tasks.unlit: {unlit}, line 3: it needs text",
        f"data.tasks.unlit: {unlit}, line 4: seed of the record",
        "data.tasks.empty: ",
        "data.tasks.gone: ",
        "data.tasks.odd: task=t3i is unknown; use one of t2i,",
    ):
        assert part in said
    assert "data.tasks.good" not in said


def test_what_the_policy_says_may_not_be_said_by_a_record(tmp_path: Path) -> None:
    record = {"prompt": "a cat", "guidance": 3, "text_top_k": 5, "top_p": None}
    path = write(tmp_path / "own.jsonl", [record, {"prompt": "a dog"}])
    with pytest.raises(ConfigError, match="line 1: guidance, text_top_k of the record would make"):
        read_tasks({"own": PromptTaskConfig(path=str(path))}, rewards={})


def test_the_fingerprint_tells_records_their_order_and_their_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    records = [{"prompt": "a", "images": ["cat.png"]}, {"prompt": "b"}]

    def found() -> str:
        task = PromptTaskConfig(path=str(tmp_path / "x.jsonl"), task="x2i")
        return fingerprint(read_tasks({"x": task}, rewards={})["x"])

    write(tmp_path / "x.jsonl", records)
    before = found()
    write(tmp_path / "x.jsonl", records[::-1])
    assert found() != before
    write(tmp_path / "x.jsonl", records)
    assert found() == before
    Image.effect_noise((32, 32), 9.0).convert("RGB").save(tmp_path / "cat.png")
    assert found() != before
