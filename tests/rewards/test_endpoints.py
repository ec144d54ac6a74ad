"""Judges and similarity servers that behave, and that do not: nothing is invented, all counted."""

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judged import Faulty, picture, sample
from misbehaving import (
    Behaviour,
    breaks_off,
    hangs,
    hangs_up,
    misbehaving,
    says,
    status,
    trickles,
)
from PIL import Image

from emu35.config.grpo import Unscored as Policy
from emu35.config.reward_remote import (
    ConsistencyRewardConfig,
    JudgeRewardConfig,
    ReplyForm,
    SimilarityEndpointRewardConfig,
)
from emu35.errors import ConfigError, DataError
from emu35.rewards.build import build_rewards
from emu35.rewards.counts import RewardCounts
from emu35.rewards.judge import read_score
from emu35.rewards.missing import Missing
from emu35.rewards.pool import RewardPool
from emu35.rewards.sample import Range, Sample, Score, Unscored
from emu35.rewards.scale import combine
from emu35.rewards.similarity_server import similarity_server

GOOD = says('{"score": 7}')
SHOWN = sample(pictures=[picture()], prompt="a cat")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(url: str, **changes: Any) -> JudgeRewardConfig:
    settings: dict[str, Any] = {"timeout": 5.0, "retries": 0, "backoff": 0.0, **changes}
    return JudgeRewardConfig(base_url=url, model="vlm", **settings)


def asked(
    config: JudgeRewardConfig, samples: list[Sample] | None = None
) -> tuple[list[Score], RewardCounts]:
    """Outcomes and events of ``samples`` (one by default) in a pool of this reward."""
    configs = {"judge": config}
    with RewardPool(build_rewards(configs), configs=configs) as pool:
        tickets = [pool.submit(item, rewards=["judge"]) for item in samples or [SHOWN]]
        return [ticket.result(20)["judge"] for ticket in tickets], pool.snapshot().rewards["judge"]


def pixels(url: str) -> np.ndarray:
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


# ------------------------------------------------------------------ what is asked


def test_a_judge_is_shown_rubric_references_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    item = replace(SHOWN, prompt="draw {low} {cats}", references=[picture(3)])
    rubric = "From {low} to {high}, is it {prompt}?"
    with misbehaving(GOOD) as server:
        config = judge(server.url, prompt=rubric, scale_high=7.5, api_key_env="JUDGE_KEY")
        assert asked(config, [item])[0] == [7.0]
    (got,) = server.got
    assert got.path == "/v1/chat/completions"
    assert got.headers["authorization"] == "Bearer secret-1"
    assert (got.body["model"], got.body["temperature"], got.body["max_tokens"]) == ("vlm", 0, 64)
    (message,) = got.body["messages"]
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts[0] == "From 1 to 7.5, is it draw {low} {cats}?"
    assert '{"score": N} and nothing else' in texts[-1]
    shown = [part for part in message["content"] if part["type"] == "image_url"]
    levels = [int(pixels(part["image_url"]["url"])[0, 0, 0]) for part in shown]
    assert levels == [3, 128]


def test_a_narrative_is_judged_as_a_whole() -> None:
    pictures = [picture(n) for n in (1, 2)]
    item = replace(SHOWN, pictures=pictures, texts=["once", "then", "the end"])
    with misbehaving(says("SCORE: 8.5")) as server:
        config = ConsistencyRewardConfig(base_url=server.url, model="vlm", form=ReplyForm.line)
        assert asked(config, [item])[0] == [8.5]
        (alone,), counts = asked(config, [SHOWN])
        assert isinstance(alone, Unscored)
        assert (counts.failures, counts.unscored) == (0, 1)
    (got,) = server.got
    content = got.body["messages"][0]["content"]
    order = [part.get("text", "PICTURE") for part in content][1:-1]
    expected = ["Text 1: once", "Picture 1:", "PICTURE", "Text 2: then", "Picture 2:", "PICTURE"]
    assert order == [*expected, "Text at the end: the end"]


# ------------------------------------------------------------------ replies


@pytest.mark.parametrize(
    ("form", "text", "score"),
    [
        (ReplyForm.json, '{"score": 7}', 7.0),
        (ReplyForm.json, ' {"reason": "blue, not red", "score": 2.5}\n', 2.5),
        (ReplyForm.line, "SCORE: 10", 10.0),
        (ReplyForm.line, "\nSCORE: 1.25 ", 1.25),
    ],
)
def test_a_reply_in_the_form_is_its_number(form: ReplyForm, text: str, score: float) -> None:
    assert read_score(text, form=form, scale=Range(low=1.0, high=10.0)) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "I would give it a 7 out of 10.",
        'Here you are: {"score": 7}',
        '```json\n{"score": 7}\n```',
        '{"score": "7"}',
        '{"score": true}',
        '{"score": null}',
        '{"score": [7]}',
        '{"score": NaN}',
        '{"score": 1e999}',
        '{"score": 1' + "0" * 400 + "}",
        '{"score": 7, "score": 9}',
        '{"score": 7, "other": 9}',
        '{"score": 7, "reason": 3}',
        '{"score": 7',
        "[" * 100_000,
        "SCORE: 7",
    ],
)
def test_a_reply_in_any_other_form_is_a_failure(text: str) -> None:
    with pytest.raises(DataError, match="the judge replied"):
        read_score(text, form=ReplyForm.json, scale=Range(low=1.0, high=10.0))


@pytest.mark.parametrize(
    "text",
    ["SCORE: seven", "SCORE: 7/10", "SCORE: 7\nSCORE: 8", "score: 7", "SCORE: \u0667", "Score 7"],
)
def test_a_line_in_any_other_form_is_a_failure(text: str) -> None:
    with pytest.raises(DataError, match="wanted is SCORE: 7 alone"):
        read_score(text, form=ReplyForm.line, scale=Range(low=1.0, high=10.0))


# ------------------------------------------------------------------ misbehaviour

BAD: dict[str, tuple[Behaviour, str]] = {
    "500": (status(500, b"out of memory"), "answered 500: 'out of memory'"),
    "no JSON": (status(200, b"<html>"), "no JSON: '<html>'"),
    "no completion": (status(200, b'{"choices": []}'), "no chat completion"),
    "other JSON": (status(200, b"[7]"), "no chat completion"),
    "prose": (says("A fine picture, 7 of 10!"), "wanted is"),
    "wrong scale": (says('{"score": 700}'), r"700 lies outside its scale \[1, 10\]"),
    "cut off": (says('{"score": 7}', finish="length"), "cut off"),
    "break": (breaks_off, "RemoteProtocolError"),
    "hang up": (hangs_up, "RemoteProtocolError"),
    "too long": (status(200, b" " * 2_000_000), "more than"),
    "nothing": (hangs, "no (whole )?answer within"),
    "trickle": (trickles, "no (whole )?answer within"),
}


@pytest.mark.parametrize("kind", BAD)
def test_misbehaviour_is_repeated_and_counted_and_gives_no_number(kind: str) -> None:
    behaviour, message = BAD[kind]
    slow = kind in ("nothing", "trickle")
    with misbehaving(behaviour) as server:
        config = judge(server.url, retries=1, timeout=0.3 if slow else 5.0)
        (score,), counts = asked(config)
    assert isinstance(score, Unscored)
    assert re.search(message, score.reason)
    assert "asked 2 times" in score.reason
    assert len(server.got) == counts.calls == 2
    assert (counts.retries, counts.unscored, counts.clamped) == (1, 1, 0)
    assert (counts.timeouts, counts.failures) == ((2, 0) if slow else (0, 2))
    with misbehaving(behaviour, GOOD) as server:
        # Longer, so that the good answer comes in time on a busy machine too.
        config = judge(server.url, retries=1, timeout=1.0 if slow else 5.0)
        (score,), counts = asked(config)
    assert score == 7.0
    assert (counts.calls, counts.retries, counts.unscored) == (2, 1, 0)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        (score,), counts = asked(judge(f"http://127.0.0.1:{port}/v1", retries=2))
    assert isinstance(score, Unscored)
    assert "ConnectError" in score.reason
    assert (counts.calls, counts.failures, counts.retries) == (3, 3, 2)


@pytest.mark.parametrize("code", [301, 400, 401, 404, 422])
def test_what_would_fail_again_is_not_repeated(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    with misbehaving(status(code, b"not with secret-1", Location="/v1/elsewhere")) as server:
        (score,), counts = asked(judge(server.url, retries=5, api_key_env="JUDGE_KEY"))
    assert isinstance(score, Unscored)
    assert f"answered {code}" in score.reason
    assert "secret-1" not in score.reason
    assert ("is the key in JUDGE_KEY right?" in score.reason) == (code == 401)
    assert len(server.got) == counts.calls == counts.failures == 1


def test_a_server_that_asks_to_be_left_alone_is() -> None:
    """By one sample for all of them, and not for longer than a call may take."""
    with misbehaving(status(429, Retry_After="1"), GOOD) as server:
        config = judge(server.url, retries=1, concurrency=1, timeout=3.0)
        scores, counts = asked(config, [SHOWN] * 3)
    assert scores == [7.0] * 3
    assert (counts.failures, counts.retries) == (1, 1)
    times = [got.when - server.got[0].when for got in server.got]
    assert len(times) == 4
    assert min(times[1:]) >= 1.0
    with misbehaving(status(503, Retry_After="Wed, 21 Oct 2199 07:28:00 GMT"), GOOD) as server:
        begin = time.monotonic()
        assert asked(judge(server.url, retries=1, timeout=0.6))[0] == [7.0]
        assert 0.6 <= time.monotonic() - begin < 3.0


def test_the_run_goes_on_or_stops_as_configured() -> None:
    """A judge that fails at every third answer."""
    turn = iter(range(1000))
    lock = threading.Lock()

    def every_third(handler: Any) -> None:
        with lock:
            bad = next(turn) % 3 == 0
        (status(500) if bad else GOOD)(handler)

    with misbehaving(every_third) as server:
        scores, counts = asked(judge(server.url, concurrency=4), [SHOWN] * 12)
    ranges = {"judge": Range(low=1.0, high=10.0)}
    missing = Missing()
    for score in scores:
        found = combine({"judge": score}, ranges=ranges, weights={"judge": 1.0})
        assert found.total == (None if isinstance(score, Unscored) else 7.0)
        missing.add(found, trained=["judge"])
    assert missing.unscored == counts.failures == counts.unscored == 4
    missing.check(policy=Policy.drop, most=0.5)
    with pytest.raises(DataError, match=r"judge failed at 4.*answered 500.*unscored=stop"):
        missing.check(policy=Policy.stop, most=0.5)
    with pytest.raises(DataError, match=r"above stage.max_unscored=0.3"):
        missing.check(policy=Policy.drop, most=0.3)


# ------------------------------------------------------------------ similarity


def levels(item: Sample) -> Score:
    if item.prompt == "nothing":
        return Unscored("no words")
    return float(item.pictures[0].mean()) / 255


@pytest.fixture(scope="module")
def similarity() -> Iterator[str]:
    server = similarity_server(Faulty(levels), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def compared(url: str, samples: list[Sample], **changes: Any) -> tuple[list[Score], RewardCounts]:
    settings: dict[str, Any] = {"timeout": 5.0, "retries": 0, "backoff": 0.0, **changes}
    configs = {"clip": SimilarityEndpointRewardConfig(base_url=url, **settings)}
    with RewardPool(build_rewards(configs), configs=configs) as pool:
        tickets = [pool.submit(item, rewards=["clip"]) for item in samples]
        return [ticket.result(20)["clip"] for ticket in tickets], pool.snapshot().rewards["clip"]


def test_the_similarity_server_and_its_client_agree(similarity: str) -> None:
    samples = [
        sample(pictures=[picture(51)]),
        sample(pictures=[picture(0), picture(204)]),
        sample(),
        sample(pictures=[picture()], prompt="nothing"),
        sample(pictures=[picture(255)]),
    ]
    scores, counts = compared(similarity, samples, batch_size=8)
    assert scores[:2] == pytest.approx([0.2, 0.4])
    assert scores[2] == Unscored("the answer has no picture")
    assert scores[3] == Unscored("no words")
    assert scores[4] == pytest.approx(1.0)
    assert (counts.samples, counts.unscored, counts.failures) == (5, 2, 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"scores": [0.5, 0.5]}, "2 scores for 1 pairs"),
        ({"scores": [31.0]}, r"31 lies outside its scale \[-1, 1\]"),
        ({"scores": ["0.5"]}, "as a score"),
        ({"scores": [None]}, "as a score"),
        ({"scores": [True]}, "as a score"),
        ({"score": [0.5]}, "no scores for 1 pairs"),
        ([0.5], "no scores"),
    ],
)
def test_a_similarity_server_that_answers_otherwise(body: Any, message: str) -> None:
    with misbehaving(status(200, json.dumps(body).encode())) as server:
        (score,), counts = compared(server.url, [SHOWN], retries=1)
    assert isinstance(score, Unscored)
    assert re.search(message, score.reason)
    assert (counts.failures, counts.retries, counts.unscored) == (2, 1, 1)


def test_the_similarity_server_refuses_what_it_cannot_read(similarity: str) -> None:
    import httpx

    def post(path: str, body: Any) -> httpx.Response:
        return httpx.post(similarity + path, json=body)

    assert post("/similarity", {"pairs": [{"text": "x"}]}).status_code == 400
    torn = {"text": "x", "image": "data:image/png;base64,AAAA"}
    assert post("/similarity", {"pairs": [torn]}).status_code == 400
    assert post("/similarity", {"pairs": [{"text": "x", "image": "x.png"}]}).status_code == 400
    assert post("/other", {"pairs": []}).status_code == 404
    assert post("/similarity", {"pairs": []}).json() == {"scores": []}


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "is no address"),
        ({"base_url": "http://host:port/v1"}, "is no address"),
        ({"base_url": "https://user:key@host/v1"}, "is no address"),
        ({"model": ""}, "name the model"),
        ({"prompt": "Is it good?"}, "has no {prompt}"),
        ({"batch_size": 4}, "one answer a call"),
        ({"scale_low": 10.0}, "must lie below scale_high"),
        ({"low": 0.0, "high": 10.0}, r"must lie in the scale \[1.0, 10.0\], not at 0.0"),
    ],
)
def test_mistakes_in_a_judges_configuration(changes: dict[str, Any], message: str) -> None:
    config = JudgeRewardConfig(base_url="http://host:8000/v1", model="vlm")
    assert list(config.problems("j")) == []
    (problem,) = replace(config, **changes).problems("j")
    assert re.search(message, problem)


def test_a_key_that_is_not_there_is_told_before_anything_is_asked() -> None:
    config = judge("http://127.0.0.1:1/v1", api_key_env="EMU35_NO_SUCH_KEY")
    with pytest.raises(ConfigError, match=r"stage.rewards.judge: .*EMU35_NO_SUCH_KEY.* not set"):
        build_rewards({"judge": config})
