"""Everything a client can do wrong gets an error that names it, and the server lives."""

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from emu35.stages.serve.prompt_ids import check_ids
from emu35.stages.serve.refusal import Refusal
from emu35.tokens.serialize import image_tokens

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


def asked(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def dialogue(**answer: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", **answer}]
    return {"messages": [*turns, {"role": "user", "content": "z"}]}


def png(height: int = 8, width: int = 8) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def bomb(width: int, height: int) -> str:
    """A PNG of a hundred bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


NAN = float("nan")

WRONG: list[tuple[str, Any, int, str]] = [
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_new_tokens=0 must be at least 1"),
    (TEXT, {"prompt": "x", "max_tokens": 4000}, 400, "exceed the engine's length 512"),
    (TEXT, {"prompt": "x", "max_tokens": "many"}, 400, 'max_tokens="many": input should be'),
    (TEXT, {"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    (TEXT, {"prompt": "x", "temperature": NAN}, 400, "temperature=NaN: input should be a finite"),
    (TEXT, {"prompt": "x", "temperature": -1}, 400, "temperature -1.0 must be 0"),
    (TEXT, {"prompt": "x", "temperature": 1e308}, 400, "less than or equal to 1000"),
    (TEXT, {"prompt": "x", "guidance": -1e39}, 400, "greater than or equal to -1000"),
    (TEXT, {"prompt": "x", "guidance": NAN}, 400, "guidance=NaN"),
    (TEXT, {"prompt": "x", "top_p": 2}, 400, "top-p 2.0 must lie in"),
    (TEXT, {"prompt": "x", "n": 1000}, 400, "n=1000"),
    (TEXT, {"prompt": ["x"] * 100, "n": 100}, 400, "100 prompts with n=100 are 10000 answers"),
    (TEXT, {"prompt": "x", "seed": -1}, 400, "seed=-1"),
    (TEXT, {"prompt": "x", "stop": ["", "a"]}, 400, "none empty"),
    (TEXT, {"prompt": "x", "stop": 7}, 400, "stop: 7 must be a string"),
    (TEXT, {"prompt": "x", "echo": True}, 400, "echo=true is not supported"),
    (TEXT, {"prompt": "x", "logprobs": 99}, 400, "logprobs=99"),
    (TEXT, {"prompt": "x", "task": "paint"}, 400, "'t2i', 'x2i'"),
    (TEXT, {"prompt": "x", "decoder": "magic"}, 400, "'ar' or 'dida'"),
    (TEXT, {"prompt": "x", "decoder": "dida", "denoise_steps": 0}, 400, "denoise_steps=0"),
    (TEXT, {"prompt": "x", "decoder": "dida", "sampler": "euler"}, 400, "'kinetic_euler'"),
    (TEXT, {"prompt": "x", "decoder": "dida", "denoise_shift": 0}, 400, "denoise_shift=0"),
    (TEXT, {"prompt": "x", "decoder": "dida", "guidance_until": 2}, 400, "guidance_until=2"),
    (TEXT, {"prompt": "x", "sampler": "remdm"}, 400, "sampler holds for parallel decoding"),
    (TEXT, {"prompt": "x", "tmperature": 1}, 400, "did you mean 'temperature'?"),
    (TEXT, {"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty=0.5 is not"),
    (TEXT, {"prompt": "x", "ratio": "7:5"}, 400, "'7:5' is unknown; use one of 4:3"),
    (TEXT, {"prompt": "x", "size": "big"}, 400, "HEIGHTxWIDTH"),
    (TEXT, {"prompt": "x", "size": "2x2", "ratio": "1:1"}, 400, "give one of them"),
    (TEXT, {"prompt": "x", "model": "other"}, 404, 'use "tiny"'),
    (TEXT, {}, 400, "prompt is missing"),
    (TEXT, {"prompt": []}, 400, "[] is no prompt"),
    (TEXT, {"prompt": ["a", 3]}, 400, "is no prompt"),
    (TEXT, {"prompt": [1, 2.5]}, 400, "is no prompt"),
    (TEXT, {"prompt": [462, 9000]}, 400, "id 9000 at position 1"),
    (TEXT, {"prompt": [10**30]}, 400, "position 0: ids must lie in 0.."),
    (TEXT, {"prompt": [462], "guidance": 3.0}, 400, "needs unconditional_prompt"),
    (TEXT, {"prompt": [462], "unconditional_prompt": [-1]}, 400, "unconditional_prompt: id -1"),
    (TEXT, {"prompt": "x" * 100_000}, 400, "100000 characters"),
    (TEXT, [1, 2], 400, "must be a JSON object"),
    (TEXT, {"prompt": [65] * 513}, 400, "prompt: 513 ids; this server holds 512 tokens"),
    (TEXT, {"prompt": [65], "unconditional_prompt": [65] * 600}, 400, "unconditional_prompt: 600"),
    (TEXT, {"prompt": "x", "unconditional_prompt": [1.5]}, 400, "[1.5] must be a list of token"),
    (TEXT, {"prompt": "x", "top_k": -2}, 400, "top-k -2 must be 0"),
    (TEXT, {"prompt": "x", **{str(at): 1 for at in range(200)}}, 400, "201 fields in one object"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": ""}] * 20_000}, 400, "20000 messages and"),
    (CHAT, dialogue(token_ids=[65] * 600), 400, "messages[1].token_ids: 600 ids"),
    (CHAT, dialogue(content="y", tool_calls=[{"id": "1"}]), 400, "messages[1]: tool_calls=[{"),
    (CHAT, dialogue(content="y", ratios=1), 400, "unknown field 'messages[1].ratios'; leave it"),
    (CHAT, dialogue(content="y", token_idz=1), 400, "did you mean 'token_ids'?"),
    (CHAT, asked([{**part(png()), "nmber": 1}]), 400, "content[0].nmber'; did you mean 'number'?"),
    (CHAT, asked([{"type": "image_url", "image_url": {"uri": ""}}]), 400, "did you mean 'url'?"),
    (CHAT, asked("x", image_sampling={"topk": 1}), 400, "did you mean 'top_k'?"),
    (CHAT, asked(["x" * 40_000, "y" * 40_000]), 400, "messages[0].content[0]"),
    (CHAT, dialogue(content="y" * 80_000), 400, "a text of 80002 characters"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, 'messages[0].role="robot"'),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "must be the user's"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "no content"),
    (CHAT, asked("x", top_logprobs=2), 400, "needs logprobs=true"),
    (CHAT, asked("x", max_tokens=2, max_completion_tokens=2), 400, "one thing"),
    (CHAT, asked("  "), 400, "prompt is empty"),
    (CHAT, asked("x", task="t2i", size="40x40"), 400, "the size needs 1647"),
    (CHAT, asked("x", task="t2i", max_images=3), 400, "max_images=3, but task t2i is one image"),
    (CHAT, asked([{"type": "sound", "sound": "x"}]), 400, "messages[0].content[0]"),
    (CHAT, asked([part("https://example.org/x.png")]), 400, "fetches nothing from the network"),
    (CHAT, asked([part("file:///etc/passwd")]), 400, "is no picture"),
    (CHAT, asked([part("data:image/png;base64,@@@@")]), 400, "not base64"),
    (CHAT, asked([part("data:image/png;base64,AAAA")]), 400, "content[0]: not an image"),
    (CHAT, asked([part(png()[:-30])]), 400, "messages[0].content[0]: "),
    (CHAT, asked([part(png())], image_area=10**12), 400, "image_area=1000000000000 must lie in"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "message"), WRONG)
def test_wrong_calls_are_told_why(server, path: str, body: Any, status: int, message: str) -> None:
    answer = server.post(
        path, None, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_all_problems_are_named_together(server) -> None:
    error = server.post(TEXT, {"prompt": 3, "n": 0, "stream": "yes"}).json()["error"]["message"]
    assert "prompt" in error
    assert "n=0" in error
    assert 'stream="yes"' in error


def test_what_is_no_json_or_no_endpoint(server) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b"", b'{"prompt": "\\ud800"}'):
        answer = server.post(TEXT, None, content=content, headers=headers)
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["message"]
    # What another site's form could send without asking is not taken.
    plain = server.post(
        TEXT, None, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415
    assert "there are /v1/completions" in server.get("/v2/nothing").json()["error"]["message"]
    assert server.get(TEXT).status_code == 405


def test_openai_sees_its_own_exceptions(server) -> None:
    with pytest.raises(openai.BadRequestError, match="must lie in"):
        server.client.completions.create(model="tiny", prompt="x", top_p=7)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.client.completions.create(model="gpt", prompt="x")


def test_a_lone_surrogate_is_text_like_any_other(server) -> None:
    body = json.dumps({"prompt": "a\ud83d\ude00", "max_tokens": 2}).encode()
    headers = {"Content-Type": "application/json"}
    assert server.post(TEXT, None, content=body, headers=headers).status_code == 200


def test_ten_thousand_references_are_refused_at_once_and_none_is_opened(
    server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr("emu35.stages.serve.pictures.open_image", unreachable)
    monkeypatch.setattr("emu35.stages.serve.pictures._content", unreachable)
    begun = time.perf_counter()
    answer = server.post(CHAT, asked([part(png())] * 10_000))
    assert time.perf_counter() - begun < 5
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "10000 images in one call; this server takes at most 16" in error["message"]
    assert error["code"] == "too_many_images"


@pytest.mark.parametrize("size", [(60_000, 60_000), (2, 40_000_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_by_their_header(server, size: tuple[int, int]) -> None:
    begun = time.perf_counter()
    answer = server.post(CHAT, asked([part(bomb(*size))]))
    assert time.perf_counter() - begun < 2
    assert answer.status_code == 400
    assert "33554432 pixels" in answer.json()["error"]["message"]


def test_a_large_body_is_refused_before_it_is_read(start_server) -> None:
    from emu35.stages.serve.options import Limits

    server = start_server(limits=Limits(max_body_mb=1))
    # By what it declares: the body itself is never sent.
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {10**12}\r\n\r\n".encode()
        )
        assert b" 413 " in connection.recv(4096)
    # By what comes: three times the limit in pieces of unknown number.
    answer = server.post(
        TEXT,
        None,
        content=(b" " * 2**16 for _ in range(48)),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 413
    assert "at most 1048576" in answer.json()["error"]["message"]
    assert server.get("/health").status_code == 200


def test_a_body_of_millions_of_ids_stops_nobody(server) -> None:
    """Twenty million are refused before they are made, some millions while others are served."""
    many = b'{"prompt": [' + b",".join([b"65"] * 20_000_000) + b"]}"
    some = b'{"prompt": "x", "unconditional_prompt": [' + b",".join([b"65"] * 1_000_000) + b"]}"
    headers = {"Content-Type": "application/json"}
    slowest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal slowest
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                begun = time.perf_counter()
                client.get(f"{server.url}/health")
                slowest = max(slowest, time.perf_counter() - begun)

    watching = threading.Thread(target=watch)
    watching.start()
    begun = time.perf_counter()
    refused = server.post(TEXT, None, content=many, headers=headers)
    long = server.post(TEXT, None, content=some, headers=headers)
    seconds = time.perf_counter() - begun
    done.set()
    watching.join()
    assert refused.status_code == 413
    assert "19999999 commas" in refused.json()["error"]["message"]
    assert long.status_code == 400
    assert "unconditional_prompt: 1000000 ids" in long.json()["error"]["message"]
    assert slowest < 1
    assert seconds < 5


def test_a_body_that_drips_is_given_up(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emu35.stages.serve.bodies._SILENCE", 0.5)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Content-Length: 1000\r\n\r\n".encode()
        )
        connection.settimeout(0.1)
        begun, answer = time.perf_counter(), b""
        while not answer and time.perf_counter() - begun < 5:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(4096)
        connection.settimeout(5)
        # The words may come after the headers.
        while not answer.endswith(b"}") and (more := connection.recv(4096)):
            answer += more
    assert b" 408 " in answer
    assert b"less than 131072 a second" in answer
    assert time.perf_counter() - begun < 4
    assert server.service.bodies._held == 0


def test_a_full_line_is_429_and_says_when_to_come_back(start_server) -> None:
    server = start_server(max_requests=1, max_waiting=1)
    # Three answers are more than one that runs and one that waits.
    answer = server.post(TEXT, {"prompt": "x", "n": 3, "max_tokens": 2})
    assert answer.status_code == 400
    large = {"task": "t2i", "size": "20x22"}
    with server.client.completions.create(
        model="tiny", prompt="x", n=2, stream=True, extra_body=large
    ) as stream:
        next(iter(stream))
        full = server.post(TEXT, {"prompt": "x"})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(model="tiny", prompt="x")
    # The stream was left, so there is room again.
    for _ in range(100):
        if server.metric("emu35_requests_active") == 0:
            break
        time.sleep(0.05)
    assert server.post(TEXT, {"prompt": "x", "max_tokens": 2}).status_code == 200


def test_the_api_key(start_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_TEST_KEY", "secret")
    server = start_server(api_key_env="SERVE_TEST_KEY")
    for path in (TEXT, CHAT):
        assert server.post(path, {"prompt": "x"}).status_code == 401
    with pytest.raises(openai.AuthenticationError, match="Authorization"):
        server.client.models.list()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices
    # Health, metrics and the page's own text tell nothing that is worth a key.
    assert server.get("/health").status_code == server.get("/").status_code == 200


IMAGE = [[1, 2, 3], [4, 5, 6]]


def test_ids_of_whole_images_pass(server) -> None:
    tokenizer = server.service.asker.tokenizer
    vocabulary = tokenizer.vocabulary
    image = image_tokens(IMAGE, tokenizer)
    check_ids(
        [vocabulary.bos, *image, *image, 65, *image],
        tokenizer=tokenizer,
        name="prompt",
        max_length=512,
    )
    check_ids([], tokenizer=tokenizer, name="prompt", max_length=512)
    check_ids(image_tokens([[0]], tokenizer), tokenizer=tokenizer, name="prompt", max_length=512)
    wide = image_tokens(np.zeros((1, 120), int), tokenizer)
    check_ids(wide, tokenizer=tokenizer, name="prompt", max_length=512)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids, v: ids[:-1], r"position 13: the prompt ends inside the 2\*3 image"),
        (lambda ids, v: ids[:4], r"at position 2: the image that begins here names no size"),
        (lambda ids, v: [*ids[:9], *ids[10:]], r"row 0 of the 2\*3 image .* has 2 codes"),
        (lambda ids, v: [*ids[:9], ids[8], *ids[9:]], r"row 0 of the 2\*3 image .* must end here"),
        (lambda ids, v: [*ids[:3], ids[5], *ids[4:]], r"row 0 of the 3\*3|row 1 of the 3\*3"),
        (lambda ids, v: [*ids[:3], 65, *ids[4:]], "names no size"),
        (lambda ids, v: [*ids[:10], 65, *ids[11:]], r"position 10: row 0 .* must end here"),
        (lambda ids, v: [*ids, v.visual_start], "position 15: outside an image"),
        (lambda ids, v: [v.eoi, *ids], "position 0: outside an image"),
        (lambda ids, v: [*ids[:2], v.eol, *ids[2:]], "position 2: outside an image"),
        (lambda ids, v: [*ids[:8], v.boi, *ids[8:]], "position 8"),
        (lambda ids, v: [*ids, v.size], "position 15: ids must lie in"),
    ],
)
def test_spoilt_images_are_refused_at_their_position(server, spoil, message: str) -> None:
    tokenizer = server.service.asker.tokenizer
    vocabulary = tokenizer.vocabulary
    ids = [vocabulary.bos, 65, *image_tokens(IMAGE, tokenizer)]
    with pytest.raises(Refusal, match=message) as caught:
        check_ids(spoil(ids, vocabulary), tokenizer=tokenizer, name="prompt", max_length=512)
    assert caught.value.status == 400


def test_no_refused_call_leaves_anything_behind(server) -> None:
    """Runs last in this file: after all of the above the shared server is as it was."""
    assert server.get("/health").json()["status"] == "ok"
    assert server.metric("emu35_requests_active") == server.metric("emu35_requests_waiting") == 0
    assert server.metric("emu35_cache_used_tokens") == 0
    assert server.service.open_calls <= 1
