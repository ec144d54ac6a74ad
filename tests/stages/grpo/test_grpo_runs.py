"""Runs of reinforcement learning from start to end, stopped, killed, replayed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import configure, function_reward, learn, rows
from torchrun_ranks import run_ranks

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.source import describe, load_model
from emu35.config import CheckpointConfig, ParallelConfig, Precision, RunConfig
from emu35.config.io import write_config
from emu35.errors import CheckpointError, DataError, Interrupted
from emu35.stages.grpo.archive import archived_steps, read_groups


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = load_model(describe(folder), parallel=ParallelConfig(), precision=Precision.fp32)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def told(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Every row of the log with its step, those of validations apart."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row) for row in map(json.loads, lines)]


def assert_same_run(one: Path, other: Path, *, steps: int = 4) -> None:
    """Equal in every answer, score, metric and weight."""
    assert archived_steps(one / "rollouts") == archived_steps(other / "rollouts")
    for step in range(1, steps + 1):
        for a, b in zip(
            read_groups(one / "rollouts", step=step),
            read_groups(other / "rollouts", step=step),
            strict=True,
        ):
            assert (a.serial, a.prompt.id, a.scores) == (b.serial, b.prompt.id, b.scores)
            for x, y in zip(a.rollouts, b.rollouts, strict=True):
                np.testing.assert_array_equal(x.ids, y.ids)
                np.testing.assert_array_equal(x.logprobs, y.logprobs)
    assert rows(one) == rows(other)
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = learn(configure(folder, start=start))
    assert result.step == 4
    return folder


def test_a_run_learns_what_its_reward_pays_for(start: Path, tmp_path: Path) -> None:
    """The mean level of pictures rises by more than answers to one prompt differ at first."""
    stage = {"steps": 30, "rollouts_per_prompt": 8, "rollout": {"save": False}}
    folder = tmp_path / "run"
    learn(configure(folder, start=start, stage=stage))
    found = [row for _, row in sorted(rows(folder).items())]
    rewards = [row["reward/draw/light"] for row in found]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + found[0]["reward_std"]


def test_what_a_step_reports(whole: Path) -> None:
    found = rows(whole)
    assert sorted(found) == [1, 2, 3, 4]
    first = found[1]
    assert first["drift/largest"] < 1e-4
    assert first["ratio"] == pytest.approx(1, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert found[4]["kl"] > 0
    assert first["answers_trained"] == 1
    assert first["sampled_visual"] == 4 * 3 * 12
    assert first["unscored/draw/light"] == first["clamped/draw/light"] == 0
    assert 1 <= first["reward/draw"] <= 10
    assert first["diversity/images"] == 1


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    start: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = configure(folder, start=start, reward="terminating")
    with pytest.raises(Interrupted, match="saved"):
        learn(config)
    assert max(archived_steps(folder / "rollouts")) < 4
    learn(config)
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.multiproc
def test_ranks_of_which_one_was_stopped_give_up_their_step_together(
    start: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two ranks that sample a part each is asked to stop in the middle of the third
    step. Both leave with the second one saved, and go on as if nothing had happened. What either of
    them judges is counted."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    folder = tmp_path / "run"
    config = configure(
        folder,
        start=start,
        reward="terminating_one_rank",
        parallel={"cp": 2, "zero1": False},
        launch={"nproc": 2},
        stage={"rollout": {"batch_size": 1}, "rewards": {"lost": function_reward("broken")}},
        data={"tasks": {"draw": {"held_out": ["lost"]}}},
        checkpoint={"every": 0},
    )
    folder.mkdir()
    write_config(config, folder)
    worker, said = str(Path(__file__).with_name("learning_worker.py")), tmp_path / "said.txt"
    run_ranks([worker, str(folder), str(said), "0"], ranks=2, timeout=240)
    assert "at step 2/4; saved in" in said.read_text()
    assert archived_steps(folder / "rollouts") == [1, 2]
    run_ranks([worker, str(folder), str(said), "1000"], ranks=2, timeout=240)
    assert said.read_text() == "step 4"
    for step in range(1, 5):
        for a, b in zip(
            read_groups(folder / "rollouts", step=step),
            read_groups(whole / "rollouts", step=step),
            strict=True,
        ):
            assert (a.serial, a.prompt.id) == (b.serial, b.prompt.id)
            for x, y in zip(a.rollouts, b.rollouts, strict=True):
                np.testing.assert_array_equal(x.ids, y.ids)
    for _, row in told(folder):
        assert row["scoring/lost/failures"] == 12


@pytest.mark.slow
def test_a_validation_that_was_given_up_comes_first_again(start: Path, tmp_path: Path) -> None:
    """Stopped among the answers of the validation behind step 2."""

    def configured(name: str, reward: str) -> RunConfig:
        config = configure(
            tmp_path / name / "run",
            start=start,
            reward=reward,
            stage={
                "validate_every": 2,
                "evaluation": {"samples": 3},
                "rollout": {"batch_size": 1},
            },
            data={"validation": {"held": {"path": "x", "size": "3x4", "rewards": {"light": 1.0}}}},
        )
        config.data.validation["held"].path = config.data.tasks["draw"].path  # type: ignore[attr-defined]
        return config

    learn(configured("plain", "brightness"))
    stopped = configured("stopped", "terminating")
    with pytest.raises(Interrupted, match="at step 2/4; saved"):
        learn(stopped)
    found = rows(tmp_path / "stopped" / "run")
    assert "val/held/reward" not in found[2]
    learn_later(stopped)
    assert rows(tmp_path / "stopped" / "run") == rows(tmp_path / "plain" / "run")


def test_a_killed_run_goes_on_from_its_checkpoint(start: Path, whole: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of scoring the fourth step; the third is sampled and judged again."""
    folder = tmp_path / "run"
    config = configure(folder, start=start, reward="dying")
    folder.mkdir()
    write_config(config, folder)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "emu35.run.worker", str(folder)],
        env=environment,
        timeout=200,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000002"]
    again = configure(folder, start=start, reward="dying", stage={"steps": 4})
    learn_later(again)
    assert_same_run(folder, whole)


def test_a_resumed_run_keeps_its_reference_when_the_one_before_goes_on(
    start: Path, whole: Path, tmp_path: Path
) -> None:
    """Newer weights of the run that was started from change neither weights nor KL."""
    parent, folder = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(start, parent)
    config = configure(folder, start=parent, reward="terminating")
    with pytest.raises(Interrupted, match="saved"):
        learn(config)
    model = load_model(describe(parent), precision=Precision.fp32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    manager = CheckpointManager(root=parent / "checkpoints", config=CheckpointConfig(), identity={})
    manager.save(2, write=lambda to: sharded.save(to, chunks=[model], optimizer=None), extra={})
    shutil.copytree(folder, tmp_path / "later" / "run")
    learn(config)
    assert_same_run(folder, whole)
    # Once it is gone nobody pretends that another one was meant.
    shutil.rmtree(parent / "checkpoints" / "step_00000001")
    config = configure(tmp_path / "later" / "run", start=parent, reward="terminating")
    with pytest.raises(CheckpointError, match="step"):
        learn(config)


def test_a_step_of_several_updates_reports_all_of_them(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    learn(configure(folder, start=start, stage={"steps": 1, "epochs": 2, "minibatches": 2}))
    (row,) = rows(folder).values()
    assert row["updates"] == 4
    # Each of the two epochs has every sampled token once, the first update of all at ratio 1.
    assert row["sampled_visual"] == 2 * 4 * 3 * 12
    assert row["ratio_largest_visual"] > 1
    assert row["old_kl"] > 0


def learn_later(config: RunConfig) -> None:
    """Go on in a process whose reward has passed the call at which it dies."""
    import learning

    learn_calls = learning.calls
    try:
        folder = Path(config.run_dir)
        learning.calls = 1000
        from emu35.stages.grpo import stage

        stage.run(config, run_dir=folder)
    finally:
        learning.calls = learn_calls


def test_saved_answers_train_without_an_engine(start: Path, whole: Path, tmp_path: Path) -> None:
    """On the answers of another run, bit for bit what that run learned; no reward is asked."""
    folder = tmp_path / "run"
    replay = {"save": False, "replay": str(whole / "rollouts")}
    stage = {"mode": "train_only", "rollout": replay}
    learn(configure(folder, start=start, reward="constant", stage=stage))
    first, second = weights(folder), weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)
    longer = {**stage, "steps": 5}
    with pytest.raises(DataError, match=r"steps saved in .* are: 1, 2, 3, 4"):
        learn(configure(tmp_path / "longer" / "run", start=start, stage=longer))


def test_rollouts_alone_change_no_weight(start: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stage = {"mode": "rollouts_only", "steps": 2, "rollout": {"save": False}}
    learn(configure(folder, start=start, stage=stage))
    assert archived_steps(folder / "rollouts") == [1, 2]
    before, after = weights(start), weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for a, b in zip(
        read_groups(folder / "rollouts", step=1),
        read_groups(whole / "rollouts", step=1),
        strict=True,
    ):
        assert a.scores == b.scores


def test_answers_without_a_score_are_left_out_or_stop_the_run(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    learn(configure(folder, start=start, reward="undecided", stage={"steps": 2}))
    found = rows(folder)
    told = [row["unscored/draw/light"] for row in found.values()]
    assert sum(told) == 0.25  # p3 is one of seven, and eight were asked: once
    with_p3 = found[1 if told[0] else 2]
    assert with_p3["answers_trained"] == 0.75
    assert with_p3["groups_too_few"] == 0.25
    stop = {"steps": 2, "unscored": "stop"}
    with pytest.raises(DataError, match=r"no opinion.*stage.unscored=stop"):
        learn(configure(tmp_path / "b" / "run", start=start, reward="undecided", stage=stop))


def test_what_is_missing_is_counted_over_all_rounds_of_a_step(start: Path, tmp_path: Path) -> None:
    """One of seven prompts has no scores: a quarter of the round it comes in, and at most a sixth
    of three of them."""
    folder = tmp_path / "run"
    advantage = {"zero_variance": "resample", "resample_rounds": 2}
    stage = {"steps": 1, "advantage": advantage, "max_unscored": 0.2}
    learn(configure(folder, start=start, reward="hardly", stage=stage))
    (row,) = rows(folder).values()
    assert 1 / 12 <= row["unscored/draw/light"] <= 1 / 6


def held_out(folder: Path, *, start: Path, task: dict[str, Any], **stage: Any) -> RunConfig:
    """Two steps, validated after each on the same prompts as ``task`` says, under the same name;
    reward ``lost`` fails at every answer."""
    config = configure(
        folder,
        start=start,
        stage={
            "steps": 2,
            "validate_every": 1,
            "rewards": {"lost": function_reward("broken")},
            **stage,
        },
        data={"validation": {"draw": {"path": "x", "size": "3x4", **task}}},
    )
    config.data.validation["draw"].path = config.data.tasks["draw"].path  # type: ignore[attr-defined]
    return config


def test_a_validation_may_have_held_out_rewards_alone(start: Path, tmp_path: Path) -> None:
    """What fails in a validation is in its row, and not in that of the next step."""
    task = {"held_out": ["light", "lost"]}
    learn(held_out(tmp_path / "run", start=start, task=task, unscored="stop"))
    for _, row in told(tmp_path / "run"):
        if "loss" in row:
            assert not [name for name in row if "lost" in name]
        else:
            assert 1 <= row["val/draw/light"] <= 10
            assert row["val/draw/lost/unscored"] == 1
            assert row["val/scoring/lost/failures"] == 7
            assert "val/draw/reward" not in row


def test_a_validation_without_scores_is_told_and_ends_no_run(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"rewards": {"lost": 1.0}}
    assert learn(held_out(tmp_path / "a" / "run", start=start, task=task)).step == 2
    said = capsys.readouterr().out
    assert said.count("validation draw: 7 of 7 answers have no score (lost failed at 7, as") == 2
    with pytest.raises(DataError, match=r"7 of 7 answers .*unscored=stop"):
        learn(held_out(tmp_path / "b" / "run", start=start, task=task, unscored="stop"))


@pytest.mark.parametrize(("policy", "asked"), [("keep", 4), ("drop", 4), ("resample", 12)])
def test_groups_that_compare_nothing(start: Path, tmp_path: Path, policy: str, asked: int) -> None:
    """They are counted; kept they have advantages of 0, dropped they are not trained on, and
    dynamic sampling asks other prompts, as often as it may."""
    folder = tmp_path / "run"
    advantage = {"zero_variance": policy, "resample_rounds": 2}
    stage = {"steps": 1, "advantage": advantage}
    learn(configure(folder, start=start, reward="constant", stage=stage))
    (row,) = rows(folder).values()
    assert row["groups_zero_variance"] == 1
    assert len(read_groups(folder / "rollouts", step=1)) == asked
    assert row["updates"] == (1 if policy == "keep" else 0)
    assert row["answers_trained"] == (1 if policy == "keep" else 0)


def test_adapters_learn_with_the_base_as_reference(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stage = {"adapter": "lora", "lora": {"rank": 2}, "reference": "adapter_off", "steps": 2}
    learn(configure(folder, start=start, stage=stage))
    found = rows(folder)
    assert found[1]["kl"] == pytest.approx(0, abs=1e-9)
    assert found[2]["kl"] > 0
    assert found[2]["drift/largest"] < 1e-4


def test_a_held_out_reward_that_stands_still_ends_the_run(start: Path, tmp_path: Path) -> None:
    """Validated after every step on its own prompts, for two of them in vain."""
    folder = tmp_path / "run"
    config = configure(
        folder,
        start=start,
        reward="constant",
        stage={"validate_every": 1, "steps": 9, "evaluation": {"patience": 2}},
        data={"validation": {"held": {"path": "x", "size": "3x4", "rewards": {"light": 1.0}}}},
    )
    config.data.validation["held"].path = config.data.tasks["draw"].path  # type: ignore[attr-defined]
    assert learn(config).step == 3
    assert rows(folder)[3]["val/held/reward"] == pytest.approx(5.5)
    assert learn(config).steps_made == 0


def test_pages_show_groups(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    learn(configure(folder, start=start, stage={"steps": 2, "pages_every": 2, "pages_groups": 3}))
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == [f"step_0000000{step}.{kind}" for step in (1, 2) for kind in ("html", "png")]
    page = (folder / "samples" / "step_00000002.html").read_text()
    assert page.count('class="group"') == 3
    assert page.count('class="answer"') == 9
    assert "a picture of" in page
