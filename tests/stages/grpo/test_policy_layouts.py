"""Reinforcement learning in every layout against one process: the same answers are drawn, and the
same is learned from them."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from policy_worker import rounds
from torchrun_ranks import run_ranks

WORKER = Path(__file__).with_name("policy_worker.py")

PLAIN: dict[str, Any] = {"minibatches": 2, "epochs": 2, "loss": {"entropy_weight": 0.01}}
GUIDED: dict[str, Any] = {
    "rollout": {"guidance": 2.5},
    "evaluation": {"guidance": 2.5},
    "loss": {"aggregation": "token_mean", "kl_weight": 0.1},
    "drift": {"importance": "sequence", "cap": 3.0},
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"ranks": 2, "parallel": {"tp": 2, "zero1": False}},
    "pp2": {"ranks": 2, "parallel": {"pp": 2, "zero1": False}},
    "dp2-zero1": {"ranks": 2, "parallel": {"zero1": True}},
    "tp2-sp": {"ranks": 2, "parallel": {"tp": 2, "sp": True, "zero1": True}},
    "cp2": {"ranks": 2, "parallel": {"cp": 2, "zero1": True}},
    "cp2-a2a": {"ranks": 2, "parallel": {"cp": 2, "cp_comm_type": "a2a", "zero1": False}},
    "pp2-cp2": {"ranks": 4, "parallel": {"pp": 2, "cp": 2, "zero1": True}},
    "pp2-dp2-overlap": {
        "ranks": 4,
        "parallel": {"pp": 2, "zero1": True},
        "engine": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    "tp2-pp2-sp": {"ranks": 4, "parallel": {"tp": 2, "pp": 2, "sp": True, "zero1": True}},
    "tp2-cp2-sp": {"ranks": 4, "parallel": {"tp": 2, "cp": 2, "sp": True, "zero1": True}},
}
STAGES = {"plain": PLAIN, "guided": GUIDED}


@pytest.fixture(autouse=True)
def _where_tests_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks import what this process imports."""
    paths = [str(WORKER.parents[2] / "inference"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@cache
def alone(stage: str) -> list[dict[str, Any]]:
    return rounds({"stage": STAGES[stage], "kept": True, "parallel": {"zero1": False}})


def in_ranks(tmp_path: Path, layout: dict[str, Any], *, stage: str) -> list[dict[str, Any]]:
    spec = {**layout, "stage": STAGES[stage], "kept": True}
    result = tmp_path / "result.json"
    run_ranks([str(WORKER), str(result), json.dumps(spec)], ranks=spec.pop("ranks"), timeout=300)
    return json.loads(result.read_text())


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one["ids"] == other["ids"], f"step {step} drew other answers"
        assert one["drift"]["tokens"] == other["drift"]["tokens"]
        assert one["drift"]["largest"] < 1e-4
        for update, wanted in zip(one["updates"], other["updates"], strict=True):
            assert update.keys() == wanted.keys()
            for name, value in wanted.items():
                # Before the first update surrogates of size 1 cancel to nothing.
                assert update[name] == pytest.approx(value, rel=2e-4, abs=1e-5), (step, name)


def test_what_is_drawn_is_replayed() -> None:
    """Guided and not, from parts of the vocabulary: trainer and engine agree to 1e-4 nats, before
    the first update and after several."""
    for stage in STAGES:
        for step in alone(stage):
            assert step["drift"]["tokens"] > 100
            assert step["drift"]["largest"] < 1e-4
    assert alone("plain")[0]["ids"] != alone("plain")[1]["ids"]


def test_micro_batches_do_not_change_what_is_learned() -> None:
    spec = {"kept": True, "parallel": {"zero1": False}}
    for size in (2, 5):
        found = rounds({**spec, "stage": {**PLAIN, "micro_batch_size": size}})
        assert_same(found, alone("plain"))


@pytest.mark.multiproc
def test_two_ranks_draw_and_learn_what_one_does(tmp_path: Path) -> None:
    assert_same(in_ranks(tmp_path, dict(LAYOUTS["tp2"]), stage="plain"), alone("plain"))


@pytest.mark.slow
@pytest.mark.multiproc
def test_ranks_with_different_free_memory_schedule_alike(tmp_path: Path) -> None:
    """Tensor-parallel ranks feed the same streams at every step, or they wait for each other for
    ever: the cache is as large as the one with the least memory affords, here three pages."""
    layout = {**LAYOUTS["tp2"], "free": [10**9, 130_000], "steps": 1}
    assert_same(in_ranks(tmp_path, layout, stage="plain"), alone("plain")[:1])


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_draws_and_learns_what_one_process_does(
    layout: dict[str, Any], stage: str, tmp_path: Path
) -> None:
    assert_same(in_ranks(tmp_path, dict(layout), stage=stage), alone(stage))
