"""Self-distillation: what is kept, what is said of the rest, and how jobs share a set."""

from pathlib import Path

import numpy as np
import pytest
from distilling import (
    PROMPTS,
    brightness,
    call,
    documents,
    results,
    rows,
    undecided,
    write_prompts,
)

from emu35.cli import main
from emu35.data.ingest.options import Existing
from emu35.errors import ConfigError, DataError
from emu35.stages.distill.options import Part, parse_part
from emu35.stages.distill.run import distill
from emu35.tokens.template import PromptTemplate, Task

REWARD = f"distilling:{brightness.__name__}"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def scored(run: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples of five prompts, scored and all kept."""
    out = tmp_path_factory.mktemp("scored") / "out"
    distill(call(run, prompts, out, samples=3, reward=REWARD))
    return out


def test_samples_differ_and_their_seeds_do_not_depend_on_the_rest(
    run: Path, prompts: Path, scored: Path, tmp_path: Path
) -> None:
    found = rows(scored)
    assert len({row["seed"] for row in found}) == len(found) == 15
    assert [row["id"] for row in found[:4]] == [
        *(f"prompts.jsonl:1 p0#{n}" for n in range(3)),
        "prompts.jsonl:2 p1#0",
    ]
    assert len({tokens for tokens, _ in documents(scored).values()}) == 15
    distill(call(run, prompts, tmp_path / "out", batch_size=1, prompts_per_shard=5))
    (shard,) = (tmp_path / "out").glob("*.tar")
    assert shard.name == "self-000000.tar"
    own = documents(tmp_path / "out")
    assert len(own) == 5
    assert own.items() <= documents(scored).items()


def test_the_least_reward_and_the_best_decide_what_is_kept(
    run: Path, prompts: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = np.array([row["reward"] for row in rows(scored)]).reshape(5, 3)
    least = float(np.median(rewards))
    options = {"samples": 3, "reward": REWARD, "min_reward": least, "keep_best": 1}
    summary = distill(call(run, prompts, tmp_path / "out", **options))
    expected: set[str] = set()
    for number, own in enumerate(rewards):
        if own.max() >= least:
            expected.add(f"prompts.jsonl:{number + 1} p{number}#{int(own.argmax())}")
    whole = documents(scored)
    assert documents(tmp_path / "out") == {id: whole[id] for id in expected}
    found = rows(tmp_path / "out")
    assert {row["id"] for row in found if row["kept"]} == expected
    below = {row["id"] for row in found if row["why"] == "reward below the least"}
    assert below == {row["id"] for row in found if row["reward"] < least}
    rest = {row["id"] for row in found if row["why"] == "reward not among the best"}
    assert rest == {row["id"] for row in found} - expected - below
    said = capsys.readouterr().out
    assert f"5 prompts, 15 samples: {len(expected)} kept of {len(expected)} prompts" in said
    assert f"dropped: {len(below)} x reward below the least" in said
    after = np.mean([row["reward"] for row in found if row["kept"]])
    assert f"{rewards.mean():.4f} of 15 whole answers; {after:.4f} of those kept" in said
    assert summary.drops == {"reward below the least": len(below)} | (
        {"reward not among the best": len(rest)} if rest else {}
    )


def test_incomplete_answers_are_counted_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A story whose model writes noise for as long as it may, beside a picture that fits."""
    records = [
        {"prompt": "tell", "task": "story", "max_new_tokens": 40},
        {"prompt": "draw", "task": "t2i"},
    ]
    prompts = write_prompts(tmp_path / "in", records)
    options = call(
        run, prompts, tmp_path / "out", template=PromptTemplate.plain, samples=2, reward=REWARD
    )
    summary = distill(options)
    found = rows(tmp_path / "out")
    assert [row["kept"] for row in found] == [False, False, True, True]
    assert all(row["reward"] is None for row in found[:2])
    assert all(row["why"].startswith("incomplete: ") for row in found[:2])
    assert sum(summary.drops.values()) == 2
    assert "2 x incomplete: " in capsys.readouterr().out


def test_what_the_reward_cannot_judge_is_dropped_and_never_ranked(
    run: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = f"distilling:{undecided.__name__}"
    distill(call(run, prompts, tmp_path / "out", samples=2, reward=reward, keep_best=1))
    found = rows(tmp_path / "out")
    for number, (first, second) in enumerate(zip(found[::2], found[1::2], strict=True)):
        if number % 2:
            assert first["why"] == second["why"] == "the reward could not judge it"
            assert (first["detail"], first["reward"], first["kept"]) == ("no opinion", None, False)
        else:
            assert first["kept"] != second["kept"]
    said = capsys.readouterr().out
    assert "dropped: 4 x the reward could not judge it" in said
    assert "of 6 whole answers" in said


def test_a_document_that_is_too_long_is_dropped_by_name(run: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "in", [{"prompt": "x"}, {"prompt": "x" * 90}])
    distill(call(run, prompts, tmp_path / "out", sequence_length=150))
    short, long = rows(tmp_path / "out")
    assert (short["kept"], long["why"]) == (True, "longer than the sequence length")
    assert long["tokens"] > 150 >= short["tokens"]


def test_nothing_kept_is_an_error_that_says_where_to_look(
    run: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"none of 5 samples was kept; .*samples.jsonl says why"):
        distill(call(run, prompts, tmp_path / "out", reward=REWARD, min_reward=2.0))
    assert len(rows(tmp_path / "out")) == 5


def test_parts_make_what_one_job_makes(run: Path, prompts: Path, tmp_path: Path) -> None:
    settings = {"samples": 2, "reward": REWARD, "keep_best": 1}
    distill(call(run, prompts, tmp_path / "whole", **settings))
    for number in (3, 1, 2):
        part = Part(number=number, of=3)
        distill(call(run, prompts, tmp_path / "parts", part=part, **settings))
    assert documents(tmp_path / "parts") == documents(tmp_path / "whole")
    parts = [rows(tmp_path / "parts", part=f"-{number}-of-3") for number in (1, 2, 3)]
    assert [row for part in parts for row in part] == rows(tmp_path / "whole")
    assert [len(part) // 2 for part in parts] == [1, 2, 2]
    for part in (Part(number=1, of=1), Part(number=1, of=2)):
        with pytest.raises(DataError, match="holds shards of part 1-of-3"):
            distill(call(run, prompts, tmp_path / "parts", part=part, **settings))
    with pytest.raises(DataError, match="holds shards of the whole"):
        distill(call(run, prompts, tmp_path / "whole", part=Part(number=1, of=2), **settings))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="I-th of N jobs, counted from 1"):
        parse_part(text)
    assert parse_part("4/4") == Part(number=4, of=4)


@pytest.mark.parametrize(
    ("records", "changes", "messages"),
    [
        (PROMPTS, {"samples": 2, "keep_best": 3, "reward": REWARD}, ["keep_best=3 of samples=2"]),
        (PROMPTS, {"keep_best": 1}, ["keep_best needs a reward"]),
        (PROMPTS, {"min_reward": 0.5}, ["min_reward needs a reward"]),
        (PROMPTS, {"min_reward": float("nan"), "reward": REWARD}, ["must be a finite number"]),
        (PROMPTS, {"samples": 0}, ["samples=0 is too small"]),
        (PROMPTS, {"reward": "scenes"}, ["reward 'scenes' is unknown", "Did you mean 'scene'"]),
        (PROMPTS, {"reward": "scene"}, ["reward scene needs"]),
        ([], {}, ["there is no prompt"]),
        ([{"prompt": "x", "task": "chat"}, PROMPTS[0]], {}, ["line 1: task chat answers in text"]),
        ([{"prompt": "x", "decoder": "dida"}], {}, ["decoder dida is not for distillation"]),
        ([{"prompt": "x", "images": ["no.png"]}], {}, ["no.png does not exist"]),
        ([{"promt": "x"}], {"samples": 0}, ["no prompt in it", "samples=0"]),
        (PROMPTS, {"part": Part(number=1, of=6)}, ["5 prompts cannot be shared by 6 parts"]),
    ],
)
def test_mistakes_are_told_before_a_model_is_looked_for(
    tmp_path: Path, records: list, changes: dict, messages: list[str]
) -> None:
    prompts = write_prompts(tmp_path, records)
    with pytest.raises(ConfigError) as caught:
        distill(call(tmp_path / "no run", prompts, tmp_path / "out", **changes))
    for message in messages:
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_model_is_told_before_its_weights_are_read(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes(b"no picture")
    records = [{"prompt": "x", "size": "30x30"}, PROMPTS[0]]
    with pytest.raises(ConfigError, match="line 1: "):
        distill(call(run, write_prompts(tmp_path, records), tmp_path / "out"))
    torn = [{"prompt": "x", "task": Task.x2i.value, "images": ["torn.png"]}]
    with pytest.raises(DataError, match=r"reference image .*torn.png: not an image"):
        distill(call(run, write_prompts(tmp_path, torn), tmp_path / "out", image_area=48))
    assert not (tmp_path / "out").exists()


def test_other_options_are_refused_by_name_and_replacing_starts_over(
    run: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    distill(call(run, prompts, out))
    before = results(out)
    with pytest.raises(DataError, match=r"guidance was 3.0 and is 1.0; reward was None and is"):
        distill(call(run, prompts, out, guidance=1.0, reward=REWARD))
    fewer = write_prompts(tmp_path / "fewer", PROMPTS[:4])
    with pytest.raises(DataError, match="prompts was "):
        distill(call(run, fewer, out))
    assert results(out) == before
    capsys.readouterr()
    assert distill(call(run, prompts, out)).skipped == 5
    assert "5 prompts were done already" in capsys.readouterr().out
    (out / "self-000001.tar").unlink()
    assert distill(call(run, prompts, out)).skipped == 3
    assert results(out) == before
    distill(call(run, prompts, out, guidance=1.0, existing=Existing.replace))
    assert documents(out).keys() == {row["id"] for row in rows(out)}
    assert results(out)["self-000000.tar"] != before["self-000000.tar"]


def test_the_command_line(run: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = ["--run", str(run), "--out", str(tmp_path / "mine"), "--size", "3x4", "--guidance", "3"]
    command = ["data", "distill", str(prompts), *words, "--reward", REWARD, "--samples", "2"]
    assert main([*command, "--keep-best", "1", "--part", "2/2"]) == 0
    assert "3 prompts, 6 samples: 3 kept of 3 prompts" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mine").glob("*.tar")} == {"mine-2-of-2-000000.tar"}
    assert main([*command, "--keep-best", "3"]) == 2
    assert "keep_best=3 of samples=2" in capsys.readouterr().err
