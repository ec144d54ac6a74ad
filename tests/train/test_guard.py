"""Which steps may change the parameters; and with real training, that the others do not."""

import json
import math
import socket
from pathlib import Path

import pytest
from rank_pool import RankPool

from emu35.config import GuardConfig
from emu35.errors import ConfigError
from emu35.run.compose import compose
from emu35.train.guard import Guard


def judge(guard: Guard, *grad_norms: float, loss: float = 2.0) -> list[bool]:
    return [guard.accepts(loss=loss, grad_norm=norm) for norm in grad_norms]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step(bad: float) -> None:
    guard = Guard(GuardConfig())
    assert not guard.accepts(loss=bad, grad_norm=1.0)
    assert guard.reason == "its loss is not finite"
    assert not guard.accepts(loss=1.0, grad_norm=bad)
    assert guard.reason == "its gradient norm is not finite"
    assert guard.accepts(loss=1.0, grad_norm=1.0)
    assert (guard.reason, guard.skipped, guard.in_a_row) == (None, 2, 0)


def test_a_spike_is_measured_by_the_median_of_accepted_steps_alone() -> None:
    guard = Guard(GuardConfig(grad_norm_factor=3.0, window=5, max_skipped=9))
    assert all(judge(guard, 50.0, 9.0, 2.0, 1.0, 1.0))  # nothing is a spike before five steps
    assert judge(guard, 6.1, 6.1, 6.1, 6.0) == [False, False, False, True]  # the median is 2
    assert guard.skipped == 3
    assert judge(guard, 3.0) == [True]
    assert judge(guard, 6.1) == [False]  # 2, 1, 1, 6, 3: the spikes did not raise it
    assert guard.reason is not None
    assert "gradient norm 6.1 is 3.05 times the median 2" in guard.reason


def test_a_loss_spike_needs_its_own_factor_and_a_positive_median() -> None:
    for factor, losses, expected in (
        (2.0, [1.0, 1.0, 2.5], False),
        (0.0, [1.0, 1.0, 2.5], True),
        (2.0, [-1.0, -1.0, 2.5], True),
    ):
        guard = Guard(GuardConfig(loss_factor=factor, window=2))
        assert [guard.accepts(loss=loss, grad_norm=1.0) for loss in losses][-1] is expected


def test_a_step_of_several_updates_is_refused_where_all_of_them_are() -> None:
    guard = Guard(GuardConfig(max_skipped=2))
    bad, good = [guard.judge(loss=loss, grad_norm=1.0) for loss in (math.nan, 1.0)]
    assert good is None
    guard.conclude([bad, good, bad])
    assert (guard.reason, guard.skipped, guard.in_a_row) == (None, 0, 0)
    guard.conclude([bad, bad])
    assert guard.reason == bad
    assert (guard.skipped, guard.in_a_row, guard.exhausted) == (1, 1, False)
    guard.conclude([])  # nothing to learn from: neither good nor bad
    assert (guard.reason, guard.in_a_row) == (None, 1)
    guard.conclude([bad])
    assert guard.exhausted


def test_state_survives_json_bit_for_bit() -> None:
    config = GuardConfig(grad_norm_factor=1.5, window=4, max_skipped=3)
    one, other = Guard(config), Guard(config)
    judge(one, 0.1, 1 / 3, 0.7, 2 / 7, math.nan, math.nan)
    other.load_state_dict(json.loads(json.dumps(one.state_dict(), allow_nan=False)))
    assert not other.exhausted
    numbers = (1 / 3 * 1.5, 1 / 3 * 1.5000001, math.nan, math.nan, math.nan)
    assert judge(other, *numbers) == judge(one, *numbers)
    assert other.state_dict() == one.state_dict()
    assert other.exhausted


def test_settings_that_would_refuse_ordinary_steps_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["guard.grad_norm_factor=0.5", "guard.loss_factor=1", "guard.max_skipped=0"])
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "guard.max_skipped",
        "guard.grad_norm_factor",
        "guard.loss_factor",
    ]


BAD = {"2": "gradient", "3": "loss"}
LAYOUTS = [{"ranks": 2, "tp": 2}, {"ranks": 2, "zero1": True}, {}]
SLOW_LAYOUTS = [
    pytest.param({"ranks": 2, **sizes}, marks=pytest.mark.slow)
    for sizes in ({"pp": 2}, {"cp": 2}, {})
]


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", [*LAYOUTS, *SLOW_LAYOUTS])
def test_bad_steps_change_no_bit_on_any_rank(layout: dict, pools: dict[int, RankPool]) -> None:
    """Step 2 has a NaN gradient and step 3 a NaN loss, on the last rank alone."""
    ranks = layout.get("ranks", 1)
    run = pools[ranks].train(**layout, bad=BAD, validate=False)
    first, second, third, fourth, fifth = run["digests"]
    assert first == second == third
    assert all(a != b for a, b in zip(third, fourth, strict=True))
    assert all(a != b for a, b in zip(fourth, fifth, strict=True))
    assert run["reasons"][1] == ["its gradient norm is not finite"] * ranks
    assert run["reasons"][2] == ["its loss is not finite"] * ranks
    assert [run["reasons"][step] for step in (0, 3, 4)] == [[None] * ranks] * 3
    assert all(math.isfinite(run["metrics"][step]["loss"]) for step in (0, 1, 3, 4))
    assert all(math.isfinite(value) for value in run["weights"].values())


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("zero1", [False, True])
def test_a_resumed_run_is_equal_across_skipped_steps(
    zero1: bool, stop: int, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    """Stopped after two bad steps, when the optimizer has no moments yet; and between them."""
    spec = {"bad": {"1": "gradient", "2": "loss"}, "zero1": zero1, "validate": False}
    whole = pools[1].train(**spec, steps=4)
    pools[1].train(**spec, steps=stop, save=str(tmp_path / "saved"))
    rest = pools[1].train(**spec, steps=4 - stop, load=str(tmp_path / "saved"))
    assert rest["digests"] == whole["digests"][stop:]
    assert rest["digests"][-1] != whole["digests"][0]


@pytest.mark.multiproc
def test_a_slow_rank_is_named_with_its_host(pools: dict[int, RankPool]) -> None:
    rows = pools[2].train(slow_rank=1, steps=3, validate=False)["rows"]
    for _, remarks in rows[1:]:
        assert any(f"rank 1 on {socket.gethostname()} is slow" in text for text in remarks)
    # Two micro-batches a step, each held up by 0.15 s.
    assert all(row["slowest_ratio"] > 1.5 for row, _ in rows)
    times = rows[2][0]
    assert times["time/forward_backward"] + times["time/reduction"] > 0.3
    parts = [value for name, value in times.items() if name.startswith("time/")]
    assert sum(parts) == pytest.approx(2 * times["time/step"])
