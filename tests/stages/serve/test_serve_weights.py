"""``/weights``: whatever goes wrong on the way, nothing is answered by weights that are neither the
old nor the new ones."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from trainer_side import UPDATED, embedded, requests

from emu35.checkpoint.buckets import Bucket, encode, pack, weights_tag
from emu35.checkpoint.gathered import GatheredWeights
from emu35.checkpoint.source import describe, load_model
from emu35.config import Precision
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import current_mesh
from emu35.stages.grpo.remote_body import body_of
from emu35.tokens.text import TextTokenizer

COMPLETIONS = "/v1/completions"


@pytest.fixture
def buckets(trained: Emu35Model) -> list[Bucket]:
    weights = GatheredWeights([trained], mesh=current_mesh())
    return list(weights.buckets(bucket_bytes=40_000))


@pytest.fixture
def server(updated_server: Any, drawing_run: Path) -> Any:
    """One that serves the weights of its run, whatever the last test left there."""
    model = load_model(describe(drawing_run), precision=Precision.fp32)
    buckets = list(GatheredWeights([model], mesh=current_mesh()).buckets(bucket_bytes=10**7))
    update = begin(updated_server, 0)
    for bucket in buckets:
        send(updated_server, update, bucket)
    commit(updated_server, update, tag_of(buckets, 0))
    return updated_server


@pytest.fixture
def body(tokenizer: TextTokenizer) -> dict[str, Any]:
    return body_of(requests(tokenizer)[0], model="emu35")


def begin(server: Any, version: int = 1, **more: Any) -> str:
    answer = server.post("/weights/begin", {"version": version, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["update"]


def send(
    server: Any, update: str, bucket: Bucket, *, content: bytes | None = None
) -> httpx.Response:
    return httpx.post(
        f"{server.url}/weights/bucket",
        content=encode(bucket) if content is None else content,
        headers={
            "Content-Type": "application/octet-stream",
            "X-Emu35-Update": update,
            "X-Emu35-SHA256": bucket.digest(),
        },
    )


def commit(server: Any, update: str, tag: str) -> httpx.Response:
    return server.post("/weights/commit", {"update": update, "weights": tag})


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def tag_of(buckets: list[Bucket], version: int = 1) -> str:
    return weights_tag(version, [bucket.digest() for bucket in buckets])


def test_nothing_is_answered_until_a_whole_update_came(
    server: Any,
    buckets: list[Bucket],
    body: dict[str, Any],
    trained: Emu35Model,
    tokenizer: TextTokenizer,
) -> None:
    first = server.post(COMPLETIONS, body).json()
    assert first["weights"] == server.get("/weights").json()["weights"]
    assert first["weights"].startswith("0-")
    assert len(buckets) > 4
    update = begin(server)
    for bucket in buckets[:-1]:
        assert send(server, update, bucket).json() == {"bucket": bucket.layout.index}
    answer = server.post(COMPLETIONS, body)
    assert code(answer) == (503, "weights_updating")
    assert "version 1 is under way" in answer.text
    assert answer.headers["Retry-After"] == "1"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert code(server.post("/v1/chat/completions", chat)) == (503, "weights_updating")
    health = server.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "updating")
    early = commit(server, update, tag_of(buckets[:-1]))
    assert code(early) == (409, "weights_incomplete")
    assert "tensors are not whole" in early.text
    assert code(commit(server, update, tag_of(buckets))) == (409, "weights_differ")
    assert code(server.post(COMPLETIONS, body)) == (503, "weights_updating")
    assert send(server, update, buckets[-1]).status_code == 200
    tag = tag_of(buckets)
    assert commit(server, update, tag).json() == {"weights": tag}
    assert commit(server, update, tag).json() == {"weights": tag}, "its answer may be lost"
    answer = server.post(COMPLETIONS, body).json()
    assert answer["weights"] == tag
    (expected,) = embedded(trained, requests(tokenizer)[:1], tokenizer)
    assert answer["choices"][0]["token_ids"] == expected.ids != first["choices"][0]["token_ids"]
    assert server.get("/health").json()["status"] == "ok"


def test_a_damaged_bucket_writes_nothing_and_may_come_again(
    server: Any, buckets: list[Bucket], body: dict[str, Any]
) -> None:
    update = begin(server)
    content = bytearray(encode(buckets[0]))
    content[-3] ^= 16
    for damaged in (bytes(content), encode(buckets[0])[:-5], b"", b"x" * 100):
        answer = send(server, update, buckets[0], content=damaged)
        assert code(answer) == (400, "bucket_damaged"), answer.text
    assert code(send(server, update, buckets[1])) == (409, "bucket_out_of_order")
    for bucket in buckets:
        assert send(server, update, bucket).status_code == 200
        assert send(server, update, bucket).json() == {"bucket": bucket.layout.index}
    assert commit(server, update, tag_of(buckets)).status_code == 200
    assert server.post(COMPLETIONS, body).json()["weights"] == tag_of(buckets)


def test_an_update_that_nobody_finishes_is_replaced_by_the_next(
    server: Any, buckets: list[Bucket], body: dict[str, Any]
) -> None:
    abandoned = begin(server, 1)
    for bucket in buckets[:3]:
        send(server, abandoned, bucket)
    update = begin(server, 2)
    assert code(send(server, abandoned, buckets[3])) == (409, "no_such_update")
    assert code(commit(server, abandoned, tag_of(buckets))) == (409, "no_such_update")
    for bucket in buckets:
        assert send(server, update, bucket).status_code == 200
    assert commit(server, update, tag_of(buckets, 2)).status_code == 200
    assert server.post(COMPLETIONS, body).json()["weights"] == tag_of(buckets, 2)


def test_weights_of_another_model_are_refused(
    server: Any, trained: Emu35Model, body: dict[str, Any]
) -> None:
    update = begin(server)
    strange = next(pack([("model.embed_tokens.weight", torch.ones(3, 4))], bucket_bytes=4096))
    answer = send(server, update, strange)
    assert code(answer) == (400, "bucket_misfit")
    assert "model.embed_tokens.weight has shape (3, 4)" in answer.text
    assert code(server.post(COMPLETIONS, body)) == (503, "weights_updating")


@pytest.mark.parametrize(("in_flight", "finish"), [("finish", "stop"), ("abort", "abort")])
def test_requests_in_flight_end_by_the_weights_they_began_with(
    server: Any,
    buckets: list[Bucket],
    tokenizer: TextTokenizer,
    in_flight: str,
    finish: str,
) -> None:
    # A picture of about 460 tokens.
    grammar = GrammarOptions(size=GridSize(height=20, width=22), open_image=True)
    drawn = replace(requests(tokenizer)[0], grammar=grammar, max_new_tokens=480)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, COMPLETIONS, body_of(drawn, model="emu35"))
        while not server.metric("emu35_requests_active"):
            assert not running.done(), running.result().text
        update = begin(server, in_flight=in_flight)
        answer = running.result(timeout=1).json()
    assert answer["weights"].startswith("0-")
    assert answer["choices"][0]["finish_reason"] == finish
    for bucket in buckets:
        assert send(server, update, bucket).status_code == 200
    assert commit(server, update, tag_of(buckets)).status_code == 200


def test_weights_are_replaced_only_where_that_is_allowed(
    start_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    assert server.get("/weights").json()["weights"] == "initial"
    for path in ("begin", "commit", "bucket"):
        answer = server.post(f"/weights/{path}", {"version": 1})
        assert code(answer) == (403, "weight_updates_forbidden")
        assert "--weight-updates" in answer.text
    assert server.get("/weights").json()["updates_allowed"] is False
    monkeypatch.setenv("SECRET", "abc")
    server = start_server(api_key_env="SECRET", **UPDATED)
    for path in ("begin", "commit", "bucket"):
        assert server.post(f"/weights/{path}", {"version": 1}).status_code == 401
    assert server.get("/weights").status_code == 401


def test_a_bucket_may_be_larger_than_other_bodies_but_not_endless(
    start_server: Callable[..., Any], buckets: list[Bucket]
) -> None:
    server = start_server(max_bucket_mb=1, **UPDATED)
    update = begin(server)
    assert send(server, update, buckets[0]).status_code == 200
    answer = send(server, update, buckets[1], content=b"0" * (2**20 + 1))
    assert code(answer) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"temperature": 0.5}, "temperature beside vllm_xargs"),
        ({"size": "4x4"}, "size beside vllm_xargs"),
        ({"stream": True}, "stream beside vllm_xargs"),
        ({"prompt": "words"}, "one prompt, of token ids"),
        ({"max_tokens": None}, "and max_tokens"),
        ({"vllm_xargs": {"guidanse": 2.0}}, "vllm_xargs.guidanse"),
        ({"vllm_xargs": {"guidance": 2.0}}, "unconditional prompt"),
    ],
)
def test_a_request_said_in_full_is_not_said_twice(
    server: Any, body: dict[str, Any], change: dict[str, Any], complaint: str
) -> None:
    answer = server.post(COMPLETIONS, body | change)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]
