"""A server's life: starting, clients that leave, failing steps, a crowd, being told to stop."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from emu35.checkpoint.source import describe
from emu35.cli import main
from emu35.errors import LaunchError
from emu35.inference.lead import LeadingEngine
from emu35.stages.serve import server as server_module
from emu35.stages.serve.app import build_app
from emu35.stages.serve.options import ServeOptions
from emu35.stages.serve.server import build_service

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"

PICTURE = {"prompt": "x", "task": "t2i", "size": "20x22"}
"""About 460 tokens, none of which can be the end."""


def eventually(holds: Callable[[], bool], *, seconds: float = 10) -> bool:
    deadline = time.perf_counter() + seconds
    while not holds():
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_empty(server) -> bool:
    return (
        server.metric("emu35_requests_active") == 0
        and server.metric("emu35_requests_waiting") == 0
        and server.metric("emu35_cache_used_tokens") == 0
    )


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def streaming(url: str, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    with httpx.stream("POST", f"{url}{path}", json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        yield events(answer.iter_lines())


def test_until_the_model_is_there_the_answer_is_503(drawing_run: Path) -> None:
    async def ask() -> None:
        options = ServeOptions(source=drawing_run)
        service = build_service(options, described=describe(drawing_run, message=lambda _: None))
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            health = await client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "starting")
            early = await client.post(TEXT, json={"prompt": "x"})
            assert early.status_code == 503
            assert int(early.headers["retry-after"]) > 0
            assert early.json()["error"]["code"] == "starting"
            await service.start()
            assert (await client.get("/health")).json() == {"status": "ok", "model": "tiny"}
            assert (await client.post(TEXT, json={"prompt": "x"})).status_code == 200
        await service.close()

    asyncio.run(ask())


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_client_that_leaves_a_stream_frees_its_place(server, path: str) -> None:
    ended = 'emu35_requests_ended_total{reason="abort"}'
    before = server.metric(ended)
    body = PICTURE if path == TEXT else {
        "messages": [{"role": "user", "content": "x"}], "task": "t2i", "size": "20x22", "n": 2,
    }  # fmt: skip
    with streaming(server.url, path, body) as chunks:
        next(chunks)
        assert eventually(lambda: server.metric("emu35_cache_used_tokens") > 0)
    assert eventually(lambda: is_empty(server))
    assert server.metric(ended) == before + body.get("n", 1)
    assert server.service.engine.in_flight == 0


def test_a_client_that_leaves_without_a_stream_frees_its_place(server) -> None:
    before = server.metric('emu35_requests_ended_total{reason="abort"}')
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(PICTURE).encode()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        assert eventually(lambda: server.metric("emu35_cache_used_tokens") > 0)
    assert eventually(lambda: is_empty(server))
    assert server.metric('emu35_requests_ended_total{reason="abort"}') == before + 1


def test_half_a_request_and_silence_hurt_nobody(server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
        assert server.post(TEXT, {"prompt": "x", "max_tokens": 2}).status_code == 200
    # It counts as open until it is gone, and then no more.
    assert eventually(lambda: server.service.open_calls == 0)


def test_a_failing_step_is_an_error_and_not_the_end(
    start_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []

    def remembering(*arguments: Any, **keywords: Any) -> torch.nn.Module:
        models.append(load_model(*arguments, **keywords))
        return models[-1]

    load_model = server_module.load_model
    monkeypatch.setattr(server_module, "load_model", remembering)
    server = start_server()
    weight = dict(models[0].named_parameters())["output_layer.weight"]
    sound = weight.detach().clone()

    with streaming(server.url, TEXT, PICTURE) as chunks:
        next(chunks)
        weight.data.fill_(float("nan"))
        (error,) = [chunk["error"] for chunk in chunks if "error" in chunk]
    assert error["type"] == "server_error"
    assert "diverged" in error["message"]
    health = server.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "unhealthy"
    assert "diverged" in health.json()["reason"]
    failed = server.post(TEXT, {"prompt": "x"})
    assert failed.status_code == 500
    assert "generation failed" in failed.json()["error"]["message"]
    assert server.metric("emu35_engine_failures_total") == 2
    assert is_empty(server)
    weight.data.copy_(sound)
    assert server.post(TEXT, {"prompt": "x"}).status_code == 200
    assert server.get("/health").status_code == 200


def lost(monkeypatch: pytest.MonkeyPatch) -> list[LeadingEngine]:
    """Servers get the engine of ranks that share a model; it lands in the list."""
    engines: list[LeadingEngine] = []

    def leading(**numbers: Any) -> LeadingEngine:
        engines.append(LeadingEngine(**numbers))
        return engines[-1]

    monkeypatch.setattr(server_module, "build_engine", leading)
    return engines


def out_of_memory(*_: object) -> None:
    raise MemoryError("no room for this layer")


def test_a_step_that_parts_the_ranks_ends_the_use_of_the_engine(
    start_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = lost(monkeypatch)
    server = start_server()
    with streaming(server.url, TEXT, PICTURE) as chunks:
        next(chunks)
        with engines[0].model.register_forward_pre_hook(out_of_memory):
            (error,) = [chunk["error"] for chunk in chunks if "error" in chunk]
    assert "no room for this layer" in error["message"]
    assert eventually(lambda: "restart the server" in server.get("/health").json()["reason"])
    health = server.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
    assert "have lost each other" in health.json()["reason"]
    # The layer has room again, but who knows where the other ranks are.
    failed = server.post(TEXT, {"prompt": "x"})
    assert failed.status_code == 500
    assert "have lost each other" in failed.json()["error"]["message"]
    assert server.service.engine.in_flight == 0
    # That the server can still be stopped is what start_server asserts at the end.


@pytest.mark.parametrize("command", ["abort", "submit", "close"])
def test_whatever_tells_that_the_ranks_are_lost_the_server_can_be_stopped(
    start_server, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    engines = lost(monkeypatch)
    server = start_server()

    def gone(*_: object) -> None:
        raise LaunchError("the ranks of this engine have lost each other")

    if command == "submit":
        monkeypatch.setattr(engines[0], command, gone)
        assert server.post(TEXT, {"prompt": "x"}).status_code == 500
        assert "have lost each other" in server.get("/health").json()["reason"]
        return
    with streaming(server.url, TEXT, PICTURE) as chunks:
        next(chunks)
        monkeypatch.setattr(engines[0], command, gone)
        # Its last command aborts what runs.
        stop = asyncio.run_coroutine_threadsafe(server.service.engine.stop(), server.loop)
        stop.result(timeout=10)
        *_, last = chunks
    ended = last.get("error", {}).get("message") or last["choices"][0]["finish_reason"]
    assert ended == "abort" if command == "close" else "have lost each other" in ended


def mixed(place: int) -> tuple[str, dict[str, Any]]:
    """Request ``place`` of a crowd: pictures of many sizes, text, stories, streams."""
    rng = random.Random(place)
    size = f"{rng.randint(1, 8)}x{rng.randint(1, 8)}"
    ask = {"messages": [{"role": "user", "content": f"number {place}"}], "seed": place}
    kinds: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {**ask, "task": "t2i", "size": size}),
        (TEXT, {"prompt": f"number {place}", "seed": place, "max_tokens": 40, "max_images": 0}),
        (CHAT, {**ask, "task": "story", "size": size, "max_tokens": 120}),
        (TEXT, {"prompt": ["a", "b"], "seed": place, "max_tokens": 20, "logprobs": 2}),
    ]
    path, body = kinds[place % 4]
    return path, {**body, "stream": place % 3 == 0, "return_token_ids": True}


def token_ids(answer: httpx.Response) -> list[list[int]]:
    """The ids of every choice, from a whole answer or a stream."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return [choice["token_ids"] for choice in answer.json()["choices"]]
    assert answer.text.endswith("data: [DONE]\n\n")
    ids: dict[int, list[int]] = {}
    for chunk in events(iter(answer.text.splitlines())):
        assert "error" not in chunk
        for choice in chunk["choices"]:
            ids.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
    return [ids[place] for place in sorted(ids)]


def test_sixty_four_mixed_calls_at_once_give_what_each_gives_alone(server) -> None:
    def send(place: int) -> list[list[int]]:
        path, body = mixed(place)
        return token_ids(client.post(f"{server.url}{path}", json=body))

    limits = httpx.Limits(max_connections=64)
    with httpx.Client(timeout=60, limits=limits) as client, ThreadPoolExecutor(64) as pool:
        together = list(pool.map(send, range(64)))
    assert all(ids for answer in together for ids in answer)
    with httpx.Client(timeout=60) as client:
        for place in range(0, 64, 9):
            assert send(place) == together[place]
    assert is_empty(server)


def test_metrics_count_what_happened(server) -> None:
    names = {
        "calls": 'emu35_http_requests_total{endpoint="/v1/completions",status="200"}',
        "wrong": 'emu35_http_requests_total{endpoint="/v1/completions",status="400"}',
        "visual": 'emu35_tokens_total{kind="visual"}',
        "forced": 'emu35_tokens_total{kind="forced"}',
        "prompt": 'emu35_tokens_total{kind="prompt"}',
        "images": "emu35_images_total",
        "first": "emu35_time_to_first_token_seconds_count",
        "each": "emu35_time_per_token_seconds_count",
        "queued": "emu35_queue_seconds_count",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    server.post(TEXT, {"prompt": "abc", "task": "t2i", "size": "3x4"})
    server.post(TEXT, {"prompt": "abc", "top_p": 5})
    assert eventually(lambda: server.metric(names["calls"]) > before["calls"])
    grown = {key: server.metric(name) - before[key] for key, name in names.items()}
    # BOI, 3*4, IMG, two EOL and EOI are forced.
    assert grown == {
        "calls": 1, "wrong": 1, "visual": 12, "forced": 8, "prompt": 4, "images": 1, "first": 1,
        "each": 1, "queued": 1,
    }  # fmt: skip
    text = server.get("/metrics").text
    for gauge in ("requests_waiting", "requests_active", "cache_used_tokens", "cache_tokens"):
        assert f"# TYPE emu35_{gauge} gauge" in text
    assert "# TYPE emu35_preemptions_total counter" in text


def test_the_models_name_and_its_alias(start_server) -> None:
    server = start_server(model_name="fox/large")
    ask = {"prompt": "x", "max_tokens": 2}
    assert [model.id for model in server.client.models.list()] == ["fox/large"]
    for name in ("fox/large", "emu35"):
        assert server.client.completions.create(model=name, **ask).model == "fox/large"
        assert server.client.models.retrieve(name).id == "fox/large"
    assert server.get("/health").json()["model"] == "fox/large"
    wrong = server.post(TEXT, {**ask, "model": "tiny"})
    assert wrong.status_code == 404
    assert 'use "fox/large"' in wrong.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_open_call_keeps_nothing_of_its_body(start_server, stream: bool) -> None:
    server = start_server(max_requests=1)
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
    ask = {"messages": [{"role": "user", "content": content}], "image_area": 16, "task": "x2i",
           "size": "18x20", "stream": stream}  # fmt: skip
    body = json.dumps(ask).encode()
    assert len(body) > 3 * 2**20

    def send() -> int:
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{server.url}{CHAT}", content=body, headers=headers).status_code

    def open_at_once(calls: int) -> int:
        """Bytes that so many open calls keep."""
        tracemalloc.start()
        try:
            with ThreadPoolExecutor(calls) as pool:
                answers = [pool.submit(send) for _ in range(calls)]
                assert eventually(lambda: server.service.engine.in_flight == calls, seconds=20)
                gc.collect()
                kept = tracemalloc.get_traced_memory()[0]
                assert server.service.bodies._held == 0
                server.service.engine.abort_all()
                assert [answer.result() for answer in answers] == [200] * calls
                return kept
        finally:
            tracemalloc.stop()

    assert open_at_once(4) - open_at_once(1) < len(body)


def test_a_drain_aborts_what_outlives_the_grace_time(start_server) -> None:
    server = start_server(grace=0.2)
    with streaming(server.url, TEXT, PICTURE) as chunks:
        next(chunks)
        drain = asyncio.run_coroutine_threadsafe(
            server.service.drain(hurry=asyncio.Event()), server.loop
        )
        assert eventually(lambda: server.get("/health").json()["status"] == "draining")
        late = server.post(TEXT, {"prompt": "x"})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        *_, last = chunks
    assert last["choices"][0]["finish_reason"] == "abort"
    # The picture that was cut off is named rather than sent.
    assert last["choices"][0]["problems"] == ["image without an end"]
    drain.result(timeout=10)


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """``emu35 serve`` as a user starts it: the process, its URL, and what it says."""
    command = [sys.executable, "-m", "emu35", "serve", "--port", "0", *arguments]
    said: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        stream = running.stderr
        reader = threading.Thread(target=lambda: said.extend(stream), daemon=True)
        reader.start()
        try:
            assert eventually(lambda: any("ready" in line for line in said), seconds=90), said
            url = re.search(r"http://[0-9.:]+", "".join(said))
            assert url is not None
            yield running, url[0], said
        finally:
            if running.poll() is None:
                running.kill()
            reader.join(10)


def test_sigterm_finishes_what_runs_and_ends_with_code_0(drawing_run: Path) -> None:
    with process("--run", str(drawing_run), "--grace", "60") as (running, url, said):
        with streaming(url, TEXT, PICTURE) as chunks:
            next(chunks)
            running.send_signal(signal.SIGTERM)
            assert eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
            late = httpx.post(f"{url}{TEXT}", json={"prompt": "x"})
            assert late.status_code == 503
            assert "shut down" in late.json()["error"]["message"]
            *_, last = chunks
        assert last["choices"][0]["finish_reason"] == "stop"
        assert running.wait(30) == 0
    assert said[-1] == "emu35: stopped\n"


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_ranks_answer_as_one_does(server, drawing_run: Path) -> None:
    bodies = [
        {**PICTURE, "seed": 1, "return_token_ids": True},
        {"prompt": ["a", "b"], "seed": 2, "max_tokens": 30, "return_token_ids": True},
    ]
    alone = [token_ids(server.post(TEXT, body)) for body in bodies]
    with process("--run", str(drawing_run), "--tp", "2") as (running, url, said):
        answers = [httpx.post(f"{url}{TEXT}", json=body, timeout=60) for body in bodies]
        assert [token_ids(answer) for answer in answers] == alone
        # What is refused and what is left is forgotten by both, or they would part here.
        refused = httpx.post(f"{url}{TEXT}", json={"prompt": "x", "max_tokens": 4000})
        assert refused.status_code == 400
        with streaming(url, TEXT, PICTURE) as chunks:
            next(chunks)
        with ThreadPoolExecutor(8) as pool:
            crowd = pool.map(lambda _: httpx.post(f"{url}{TEXT}", json=bodies[1]), range(8))
            assert [token_ids(answer) for answer in crowd] == [alone[1]] * 8
        with streaming(url, TEXT, PICTURE) as chunks:
            next(chunks)
            running.send_signal(signal.SIGTERM)
            *_, last = chunks
        assert last["choices"][0]["finish_reason"] == "stop"
        assert running.wait(30) == 0
    assert said[-1] == "emu35: stopped\n"


def test_what_keeps_a_server_from_starting(
    drawing_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write_other_vision: Callable[[Path], None],
) -> None:
    def says(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        return capsys.readouterr().err

    run = ("--run", str(drawing_run))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in says(*run, "--port", port)
    assert "neither a run folder" in says("--run", str(tmp_path))
    assert "does not exist" in says(*run, "--vision", str(tmp_path / "no"))
    assert "EMU35_NO_SUCH_KEY is empty" in says(*run, "--api-key-env", "EMU35_NO_SUCH_KEY")
    wrong = says(*run, "--max-requests", "0", "--port", "99999", "--grace", "nan")
    assert "3 problems" in wrong
    assert "EMU35_NO_SUCH_KEY" not in os.environ
    # Found while it loads, when the port is open already.
    write_other_vision(tmp_path / "vision")
    wrong = says(*run, "--port", "0", "--vision", str(tmp_path / "vision"))
    assert "has 32 codes, but the language model has 64" in wrong


def test_a_missing_package_is_named_with_its_extra(
    drawing_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "emu35.stages.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--run", str(drawing_run)]) == 2
    assert "uvicorn is missing; install the server's with pip install" in capsys.readouterr().err
