"""Servers that are slow, die, or answer nonsense: somebody else is asked, all of it is counted, and
in the end there is a clear error and never a made-up rollout. A proxy before a real server spoils
its answers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import torch
from trainer_side import UPDATED, Trainer, assert_same, embedded, requests

from emu35.errors import ConfigError, LaunchError
from emu35.model.transformer import Emu35Model
from emu35.stages.grpo import remote_servers
from emu35.tokens.text import TextTokenizer

COMMITS = 'emu35_http_requests_total{endpoint="/weights/commit",status="200"}'

Spoil = Callable[["Proxy", dict[str, Any]], "dict[str, Any] | None"]
"""Changes the body of an answer; None where it has dealt with the connection itself."""


@dataclass
class Between:
    """A proxy at ``url``. The first completions are spoilt, one by each of ``spoils``, the last of
    which goes on for ever with ``forever``."""

    url: str = ""
    spoils: list[Spoil] = field(default_factory=list)
    forever: bool = False
    completions: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_spoil(self) -> Spoil | None:
        with self.lock:
            self.completions += 1
            if self.forever and len(self.spoils) == 1:
                return self.spoils[0]
            return self.spoils.pop(0) if self.spoils else None


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    between: Between
    upstream: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        answer = httpx.get(self.upstream + self.path)
        self.send(answer.status_code, answer.content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        wanted = ("content-type", "x-emu35-update", "x-emu35-sha256")
        kept = {name: value for name, value in self.headers.items() if name.lower() in wanted}
        answer = httpx.post(self.upstream + self.path, content=body, headers=kept, timeout=30)
        content = answer.content
        if self.path == "/v1/completions" and (spoil := self.between.next_spoil()) is not None:
            spoilt = spoil(self, answer.json())
            if spoilt is None:
                return
            content = json.dumps(spoilt).encode()
        self.send(answer.status_code, content)


@contextmanager
def before(server: Any, *spoils: Spoil, forever: bool = False) -> Iterator[Between]:
    between = Between(spoils=list(spoils), forever=forever)
    handler = type("Own", (Proxy,), {"between": between, "upstream": server.url})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    between.url = f"http://127.0.0.1:{proxy.server_port}"
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield between
    finally:
        between.over.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def choice(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the one choice of an answer in place."""

    def spoil(proxy: Proxy, body: dict[str, Any]) -> dict[str, Any]:
        change(body["choices"][0])
        return body

    return spoil


def hangs(proxy: Proxy, body: dict[str, Any]) -> None:
    proxy.between.over.wait(20)
    proxy.close_connection = True


def hangs_up(proxy: Proxy, body: dict[str, Any]) -> None:
    proxy.close_connection = True


def breaks_off(proxy: Proxy, body: dict[str, Any]) -> None:
    proxy.send_response(200)
    proxy.send_header("Content-Length", "100000")
    proxy.end_headers()
    proxy.wfile.write(json.dumps(body).encode()[:50])
    proxy.close_connection = True


def fails(status: int, **headers: str) -> Spoil:
    return lambda proxy, body: proxy.send(status, b"no", **headers)


def page(proxy: Proxy, body: dict[str, Any]) -> None:
    proxy.send(200, b"<html>Welcome</html>")


def stale(proxy: Proxy, body: dict[str, Any]) -> dict[str, Any]:
    return body | {"weights": "initial"}


def first_free(said: dict[str, Any]) -> int:
    """The first token that was drawn."""
    return said["forced"].index(False)


def other_token(said: dict[str, Any]) -> None:
    said["token_ids"][first_free(said["logprobs"])] = 3  # text inside a picture


def likely(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        said["logprobs"]["token_logprobs"][first_free(said["logprobs"])] = value

    return change


def forced_unsure(said: dict[str, Any]) -> None:
    said["logprobs"]["token_logprobs"][said["logprobs"]["forced"].index(True)] = -0.5


def wide(said: dict[str, Any]) -> None:
    said["logprobs"]["support"][first_free(said["logprobs"])] = 10_000


GARBAGE: dict[str, Spoil] = {
    "a page": page,
    "no choice": lambda proxy, body: body | {"choices": []},
    "a list": lambda proxy, body: [body],  # type: ignore[dict-item,return-value]
    "a token of the wrong kind": choice(other_token),
    "cut short": choice(lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop())),
    "a token more": choice(lambda c: c["token_ids"].append(5)),
    "no ids": choice(lambda c: c.pop("token_ids")),
    "words for ids": choice(lambda c: c.update(token_ids=["a"])),
    "no log-probabilities": choice(lambda c: c.update(logprobs=None)),
    "infinite": choice(likely(float("-inf"))),
    "not a number": choice(likely(float("nan"))),
    "more than certain": choice(likely(0.5)),
    "null": choice(likely(None)),
    "an unsure forced token": choice(forced_unsure),
    "more candidates than legal": choice(wide),
    "another prompt": choice(lambda c: c.update(prompt_token_ids=[1, 2])),
    "aborted": choice(lambda c: c.update(finish_reason="abort")),
}


@pytest.fixture
def asked(tokenizer: TextTokenizer) -> list[Any]:
    return requests(tokenizer)[:3]


@pytest.fixture
def expected(trained: Emu35Model, asked: list[Any], tokenizer: TextTokenizer) -> list[Any]:
    return embedded(trained, asked, tokenizer)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_servers, "_BACKOFF", 0.01)


def clean(proxy: Proxy, body: dict[str, Any]) -> dict[str, Any]:
    return body


def test_nonsense_is_counted_and_asked_for_again(
    updated_server: Any,
    trainer_of: Callable[..., Trainer],
    asked: list[Any],
    expected: list[Any],
) -> None:
    many = len(GARBAGE)
    spoils = [each for spoil in GARBAGE.values() for each in (spoil, clean)]
    with before(updated_server, *spoils) as between:
        trainer = trainer_of(servers=[between.url], batch_size=1)
        assert_same(trainer.sample(asked[:1] * many), expected[:1] * many)
        assert between.completions == 2 * many
    counts = trainer.engine.counts
    assert (counts.garbage, counts.answered, counts.given_up) == (many, many, 0)
    assert sum(counts.metrics().values()) == 2 * many


@pytest.mark.parametrize(
    ("spoil", "count"),
    [(hangs_up, "disconnects"), (breaks_off, "disconnects"), (fails(500), "errors"),
     (fails(503), "errors"), (hangs, "timeouts"), (fails(429, Retry_After="0"), "busy")],
)  # fmt: skip
def test_another_attempt_gets_what_one_did_not(
    updated_server: Any,
    trainer_of: Callable[..., Trainer],
    asked: list[Any],
    expected: list[Any],
    spoil: Spoil,
    count: str,
) -> None:
    with before(updated_server, spoil) as between:
        trainer = trainer_of(servers=[between.url], timeout=1.5)
        assert_same(trainer.sample(asked), expected)
    assert trainer.engine.counts.metrics() == {
        "engine/answered": 3.0,
        **dict.fromkeys(
            (f"engine/{name}" for name in ("timeouts", "disconnects", "busy", "errors")), 0.0
        ),
        **dict.fromkeys((f"engine/{name}" for name in ("garbage", "stale", "given_up")), 0.0),
        f"engine/{count}": 1.0,
    }


def test_a_server_that_keeps_failing_is_given_up_and_the_other_does_the_work(
    start_server: Callable[..., Any],
    updated_server: Any,
    trainer_of: Callable[..., Trainer],
    asked: list[Any],
    expected: list[Any],
) -> None:
    other = start_server(**UPDATED)
    with before(updated_server, fails(500), forever=True) as between:
        trainer = trainer_of(servers=[between.url, other.url])
        assert_same(trainer.sample(asked * 4), expected * 4)
        counts = trainer.engine.counts
        assert (counts.given_up, counts.answered) == (1, 12)
        assert counts.errors == between.completions >= 3
        before_that = between.completions
        assert_same(trainer.sample(asked), expected)
        assert between.completions == before_that, "nobody asks it with the same weights"


def test_answers_by_other_weights_are_not_believed(
    updated_server: Any, trainer_of: Callable[..., Trainer], asked: list[Any]
) -> None:
    with before(updated_server, stale, forever=True) as between:
        trainer = trainer_of(servers=[between.url])
        with pytest.raises(LaunchError, match=r"no rollout server is left: .* 'initial', not '1-"):
            trainer.sample(asked)
    assert trainer.engine.counts.stale >= 1
    assert trainer.engine.counts.answered == 0


def test_a_run_ends_with_a_clear_error_when_nobody_answers(
    updated_server: Any, trainer_of: Callable[..., Trainer], asked: list[Any]
) -> None:
    with before(updated_server, hangs_up, forever=True) as between:
        trainer = trainer_of(servers=[between.url])
        with pytest.raises(LaunchError, match=f"no rollout server is left: {between.url}: Remote"):
            trainer.sample(asked)
    trainer = trainer_of(servers=["http://127.0.0.1:9", "http://127.0.0.1:10/"])
    with pytest.raises(LaunchError, match=r"no rollout server took weights 1: .*:9: .*:10: "):
        trainer.engine.prepare(asked)


def test_a_server_without_permission_is_named(
    start_server: Callable[..., Any], trainer_of: Callable[..., Trainer], asked: list[Any]
) -> None:
    server = start_server()
    with pytest.raises(LaunchError, match=r"HTTP 403 of /weights/begin: .*--weight-updates"):
        trainer_of(servers=[server.url]).engine.prepare(asked)


def test_what_a_server_can_never_answer_stops_at_once(
    start_server: Callable[..., Any], trainer_of: Callable[..., Trainer], asked: list[Any]
) -> None:
    server = start_server(max_length=20, **UPDATED)
    trainer = trainer_of(servers=[server.url])
    with pytest.raises(ConfigError, match=r"cannot answer a rollout: HTTP 400.*length"):
        trainer.sample(asked)
    assert trainer.engine.counts.answered == 0
    trainer.engine.release()
    assert not trainer.engine.busy


def test_a_server_that_loses_an_answer_to_a_bucket_is_not_left_out(
    updated_server: Any,
    trainer_of: Callable[..., Trainer],
    asked: list[Any],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[str] = []
    answers = Proxy.send

    def send(proxy: Proxy, status: int, content: bytes, **headers: str) -> None:
        if proxy.path == "/weights/bucket" and len(lost) < 2:
            lost.append(content.decode())
            proxy.close_connection = True
            return
        answers(proxy, status, content, **headers)

    monkeypatch.setattr(Proxy, "send", send)
    with before(updated_server) as between:
        trainer = trainer_of(servers=[between.url])
        assert_same(trainer.sample(asked), expected)
    assert len(lost) == 2
    assert trainer.engine.counts.given_up == 0


def test_weights_that_did_not_change_are_not_sent_again(
    updated_server: Any,
    trainer_of: Callable[..., Trainer],
    asked: list[Any],
    trained: Emu35Model,
    expected: list[Any],
) -> None:
    sent = updated_server.metric(COMMITS)
    trainer = trainer_of(servers=[updated_server.url])
    assert_same(trainer.sample(asked), expected)
    with torch.no_grad():
        next(trained.parameters()).mul_(2)
    assert_same(trainer.sample(asked), expected)
    assert updated_server.metric(COMMITS) == sent + 1
