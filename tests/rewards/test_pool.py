"""The pool of rewards: what becomes of answers while rewards fail, hang, or are slow."""

import random
import subprocess
import sys
import threading
import time

import pytest
from judged import Faulty, config, pool_of, sample, until

from emu35.rewards.lane import MOST_LOST
from emu35.rewards.pool import RewardPool, Ticket
from emu35.rewards.sample import Sample, Score, Unscored


def number(item: Sample) -> float:
    return float(item.record["n"])


def test_every_answer_gets_its_own_scores_whatever_the_order() -> None:
    def slow_at_first(item: Sample) -> Score:
        time.sleep(0.02 if item.record["n"] < 4 else 0.0)
        return number(item)

    rewards = {"slow": Faulty(slow_at_first), "fast": Faulty(lambda item: -number(item))}
    configs = {"slow": config(concurrency=4, batch_size=3), "fast": config(batch_size=5)}
    with RewardPool(rewards, configs=configs) as pool:
        tickets = [
            pool.submit(sample(n=n), rewards=["slow", "fast"][: 1 + n % 2]) for n in range(40)
        ]
        for n, ticket in enumerate(tickets):
            expected = {"slow": float(n), "fast": -float(n)} if n % 2 else {"slow": float(n)}
            assert ticket.result(timeout=10) == expected
        counts = pool.snapshot().rewards
    assert (counts["slow"].samples, counts["fast"].samples) == (40, 20)
    assert (counts["slow"].clamped, counts["fast"].clamped) == (38, 20)
    assert counts["slow"].calls == len(rewards["slow"].batches)
    assert sum(rewards["fast"].batches) == 20
    assert max(rewards["slow"].batches) <= 3


def test_as_many_calls_run_at_once_as_configured_and_a_slow_reward_holds_up_no_other() -> None:
    hold = threading.Event()

    def held(item: Sample) -> Score:
        assert hold.wait(10)
        return 0.5

    rewards = {"held": Faulty(held), "free": Faulty(lambda item: 0.25)}
    configs = {"held": config(concurrency=3), "free": config()}
    with RewardPool(rewards, configs=configs) as pool:
        both = [pool.submit(sample(), rewards=["held", "free"]) for _ in range(8)]
        until(lambda: pool.snapshot().rewards["free"].samples == 8)
        until(lambda: rewards["held"].at_once == 3)
        assert not any(ticket.done for ticket in both)
        with pytest.raises(TimeoutError, match="no score of held yet"):
            both[0].result(timeout=0.01)
        hold.set()
        assert all(ticket.result(10) == {"held": 0.5, "free": 0.25} for ticket in both)
    assert rewards["held"].most_at_once == 3


def test_a_failed_call_is_repeated_one_by_one_after_growing_waits() -> None:
    begun: list[tuple[int, float]] = []

    def poisoned(item: Sample) -> Score:
        begun.append((item.record["n"], time.monotonic()))
        if item.record["n"] == 2:
            raise OSError("torn")
        return number(item)

    with pool_of(poisoned, retries=2, backoff=0.1, batch_size=4) as pool:
        hold = [pool.submit(sample(n=n), rewards=["own"]) for n in range(4)]
        found = [ticket.result(10)["own"] for ticket in hold]
        counts = pool.snapshot().rewards["own"]
    assert found[0::3] == [0.0, 3.0]
    assert found[1] == 1.0
    assert isinstance(found[2], Unscored)
    assert "OSError: torn" in found[2].reason
    assert "asked 3 times" in found[2].reason
    assert counts.failures == 3
    assert counts.unscored == 1
    assert counts.samples == 4
    times = [when for n, when in begun if n == 2]
    assert 0.1 <= times[1] - times[0] < times[2] - times[1]
    assert times[2] - times[1] >= 0.2


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ([], "gave 0 scores for 1 samples"),
        ([1.0, 1.0], "gave 2 scores"),
        ([float("nan")], "gave nan"),
        ([True], "gave True"),
        (["7"], "gave '7'"),
        (None, "gave None"),
        ("7", "gave '7'"),
    ],
)
def test_what_is_no_score_is_a_failure_and_never_replaced(gives: object, message: str) -> None:
    reward = Faulty(number)
    reward.score = lambda samples: gives  # type: ignore[method-assign]
    with RewardPool({"own": reward}, configs={"own": config()}) as pool:
        score = pool.submit(sample(), rewards=["own"]).result(10)["own"]
        counts = pool.snapshot().rewards["own"]
    assert isinstance(score, Unscored)
    assert message in score.reason
    assert (counts.failures, counts.unscored) == (1, 1)


def test_a_verdict_of_unscored_is_not_asked_again_and_exits_end_one_call_only() -> None:
    def judge(item: Sample) -> Score:
        if item.record.get("leave"):
            sys.exit(3)
        return Unscored("nothing to see")

    with pool_of(judge, retries=5) as pool:
        verdict = pool.submit(sample(), rewards=["own"]).result(10)["own"]
        assert verdict == Unscored("nothing to see")
        assert pool.snapshot().rewards["own"].calls == 1
        left = pool.submit(sample(leave=True), rewards=["own"]).result(10)["own"]
    assert isinstance(left, Unscored)
    assert "SystemExit: 3" in left.reason


def test_a_call_that_hangs_is_given_up_and_what_it_gives_too_late_is_not_used() -> None:
    hold = threading.Event()
    first = threading.Event()

    def hangs_once(item: Sample) -> Score:
        if not first.is_set():
            first.set()
            assert hold.wait(10)
            return 0.9
        return 0.1

    with pool_of(hangs_once, retries=1, timeout=0.3) as pool:
        ticket = pool.submit(sample(), rewards=["own"])
        assert ticket.result(10) == {"own": 0.1}
        counts = pool.snapshot().rewards["own"]
        assert (counts.timeouts, counts.retries, counts.failures, counts.late) == (1, 1, 0, 0)
        hold.set()
        until(lambda: pool.snapshot().rewards["own"].late == 1)
        assert ticket.result() == {"own": 0.1}
        assert pool.submit(sample(), rewards=["own"]).result(10) == {"own": 0.1}


def test_a_reward_that_always_hangs_loses_a_bounded_number_of_threads_and_recovers() -> None:
    hold = threading.Event()

    def hangs(item: Sample) -> Score:
        hold.wait(20)
        return 0.5

    before = threading.active_count()
    with pool_of(hangs, timeout=0.15, concurrency=4) as pool:
        tickets = [pool.submit(sample(), rewards=["own"]) for _ in range(3 * MOST_LOST)]
        found = [ticket.result(10)["own"] for ticket in tickets]
        assert all(isinstance(score, Unscored) for score in found)
        assert "still run; no other is begun" in str(found[-1])
        assert threading.active_count() <= before + MOST_LOST + 4 + 1
        hold.set()
        until(lambda: pool.snapshot().rewards["own"].late >= MOST_LOST)
        assert pool.submit(sample(), rewards=["own"]).result(10) == {"own": 0.5}
    until(lambda: threading.active_count() == before)


def test_cancelled_and_closed_answers_complete_without_a_score() -> None:
    hold = threading.Event()
    before = threading.active_count()

    def held(item: Sample) -> Score:
        hold.wait(20)
        return 0.5

    pool = pool_of(held)
    running, cancelled, queued = (pool.submit(sample(), rewards=["own"]) for _ in range(3))
    until(lambda: pool.snapshot().rewards["own"].samples == 0)
    cancelled.cancel()
    assert "cancelled" in str(cancelled.result(5)["own"])
    assert not running.done
    begin = time.monotonic()
    pool.close(grace=0.1)
    assert time.monotonic() - begin < 2
    assert all("closed" in str(ticket.result(5)["own"]) for ticket in (running, queued))
    assert pool.snapshot().rewards["own"].unscored == 3
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(sample(), rewards=["own"])
    hold.set()
    until(lambda: threading.active_count() == before)


def test_a_full_queue_makes_whoever_submits_wait() -> None:
    hold = threading.Event()

    def held(item: Sample) -> Score:
        assert hold.wait(10)
        return 0.5

    with RewardPool({"own": Faulty(held)}, configs={"own": config()}, queue=2) as pool:
        for _ in range(2):
            pool.submit(sample(), rewards=["own"])
        threading.Timer(0.2, hold.set).start()
        begin = time.monotonic()
        pool.submit(sample(), rewards=["own"]).result(10)
        assert time.monotonic() - begin >= 0.15
        assert pool.snapshot().waited_seconds >= 0.15


def test_the_hidden_share_tells_scoring_beside_other_work_from_waiting_for_it() -> None:
    def slow(item: Sample) -> Score:
        time.sleep(0.1)
        return 0.5

    with pool_of(slow) as pool:
        assert pool.snapshot().hidden_share is None
        for _ in range(3):
            ticket = pool.submit(sample(), rewards=["own"])
            time.sleep(0.15)  # generation goes on
            ticket.result(10)
        beside = pool.snapshot()
        assert beside.hidden_share is not None
        assert beside.hidden_share > 0.7
        assert 0.25 < beside.busy_seconds < 1.0
        assert beside.idle_seconds > 0.1
        for _ in range(3):
            pool.submit(sample(), rewards=["own"]).result(10)
        after = pool.snapshot().since(beside)
        assert after.rewards["own"].samples == after.rewards["own"].calls == 3
        assert after.hidden_share is not None
        assert after.hidden_share < 0.2


def test_events_of_two_ranks_add_up_and_are_logged_by_name() -> None:
    with pool_of(number) as pool:
        for n in (0, 1, 7):
            pool.submit(sample(n=n), rewards=["own"]).result(10)
        one = pool.snapshot()
    both = one.plus(one)
    assert both.hidden_share == one.hidden_share
    logged = both.metrics()
    assert (logged["scoring/own/samples"], logged["scoring/own/clamped"]) == (6, 2)
    assert logged["scoring/busy_seconds"] == pytest.approx(2 * one.busy_seconds)
    quiet = both.since(both).metrics()
    assert "scoring/hidden_share" not in quiet
    assert not any(name.startswith("scoring/own") for name in quiet)


def test_whatever_goes_wrong_every_answer_is_accounted_for() -> None:
    """Several submitters, rewards that fail, hang, misreport and abstain at random."""
    rng = random.Random(5)
    over = threading.Event()

    def moody(item: Sample) -> Score:
        turn = rng.random()
        if turn < 0.15:
            raise OSError("torn")
        if turn < 0.17:
            over.wait(0.4)
        if turn < 0.25:
            return float("nan")
        if turn < 0.35:
            return Unscored("no opinion")
        return number(item)

    rewards = {"a": Faulty(moody), "b": Faulty(moody)}
    configs = {
        "a": config(concurrency=4, batch_size=4, retries=2, timeout=0.2),
        "b": config(concurrency=2, retries=1, timeout=0.2, backoff=0.002),
    }
    tickets: dict[int, Ticket] = {}

    def submit(first: int) -> None:
        for n in range(first, first + 100):
            tickets[n] = pool.submit(sample(n=n), rewards=["a", "b"] if n % 2 else ["b"])
            if n % 10 == 0:
                tickets[n].cancel()

    with RewardPool(rewards, configs=configs, queue=64) as pool:
        threads = [threading.Thread(target=submit, args=(100 * k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        results = {n: ticket.result(30) for n, ticket in tickets.items()}
        counts = pool.snapshot()
    over.set()
    assert len(results) == 400
    for name, asked in (("a", 200), ("b", 400)):
        outcomes = [found[name] for found in results.values() if name in found]
        missing = sum(isinstance(score, Unscored) for score in outcomes)
        own = counts.rewards[name]
        assert (own.samples, own.unscored) == (asked, missing)
        assert own.failures > 0
        assert own.retries > 0
        assert missing < asked / 2
    for n, found in results.items():
        assert all(isinstance(score, Unscored) or score == n for score in found.values())
    assert counts.since(counts).busy_seconds == 0.0


HANGING = """
import time
from judged import pool_of, sample
pool = pool_of(lambda item: time.sleep(600), timeout=0.2)
print(pool.submit(sample(), rewards=["own"]).result())
pool.submit(sample(), rewards=["own"])
time.sleep(0.1)
"""


def test_a_process_with_hanging_rewards_ends(tmp_path) -> None:
    """Even where nobody closed the pool."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        cwd=__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "no answer within 0.2 s" in done.stdout
