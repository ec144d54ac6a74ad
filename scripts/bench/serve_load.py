"""A crowd at the HTTP server: 64 mixed calls one by one, then all at once.

    python scripts/bench/serve_load.py --url http://127.0.0.1:8000 [--calls N] [--quick]

The calls are pictures of many sizes (guided), text and stories, whole and streamed; both passes
send the very same ones. The client is a process of its own, so that it takes no time from the
server's. The last line is JSON: ``server_speedup`` (throughput at once / one by one),
``server_failures``, and the seconds and tokens of both passes.

:func:`serving` puts a model that is in memory behind a server, :func:`measure` runs the crowd.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from emu35.inference.engine import Engine
    from emu35.tokens.text import TextTokenizer

CALLS = 64
PATIENCE = 600.0
"""Seconds that a call may take."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True, help="a server that is ready")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--quick", action="store_true", help="small pictures and short texts")
    options = parser.parse_args()
    calls = [mixed(place, quick=options.quick) for place in range(options.calls)]
    with httpx.Client(
        base_url=options.url,
        timeout=PATIENCE,
        limits=httpx.Limits(max_connections=len(calls)),
    ) as client:
        send(client, calls[0])  # what is done once, at the first call, counts for nobody
        alone = crowd(client, calls, at_once=1)
        together = crowd(client, calls, at_once=len(calls))
    found = {
        "server_speedup": round(together["rate"] / alone["rate"], 2),
        "server_failures": alone["failures"] + together["failures"],
        "one_by_one": alone,
        "at_once": together,
    }
    print(json.dumps(found))
    return 0


def measure(url: str, *, calls: int = CALLS, quick: bool = False) -> dict[str, Any]:
    """Send the crowd to the server at ``url`` from a process of its own; what :func:`main` prints.

    Raises:
        RuntimeError: the client failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--url", url, "--calls", str(calls)]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the client of {url} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def serving(
    make_engine: Callable[[], "Engine"], *, tokenizer: "TextTokenizer", max_length: int
) -> Iterator[str]:
    """A server in a thread of this process; its URL. ``make_engine`` builds the engine, whose model
    is prompted as a pretrained one and opens a picture at once where the task is one. There is no
    image tokenizer: pictures stay codes."""
    from emu35.stages.serve.asking import Asker
    from emu35.stages.serve.options import ServeOptions
    from emu35.stages.serve.server import build_server
    from emu35.stages.serve.service import Service
    from emu35.tokens.template import PromptTemplate

    loop = asyncio.new_event_loop()
    down = asyncio.Event()
    started = threading.Event()
    address: list[str] = []

    async def serve() -> None:
        service = Service(
            name="bench",
            options=ServeOptions(source=Path(), port=0),
            asker=Asker(tokenizer=tokenizer, template=PromptTemplate.plain, max_length=max_length),
            make_engine=make_engine,
            open_codec=lambda: None,
        )
        server = build_server(service)
        server.config.port = 0
        running = asyncio.create_task(server.serve())
        try:
            await service.start()
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            address.append(f"http://127.0.0.1:{port}")
            started.set()
            await down.wait()
        finally:
            started.set()
            server.should_exit = True
            await running
            await service.close()

    thread = ThreadPoolExecutor(1, thread_name_prefix="server")
    work = thread.submit(loop.run_until_complete, serve())
    started.wait()
    try:
        if not address:
            work.result()
        yield address[0]
    finally:
        if address:
            loop.call_soon_threadsafe(down.set)
        work.result()
        thread.shutdown()
        loop.close()


def speaking(tokenizer: "TextTokenizer") -> "TextTokenizer":
    """``tokenizer`` with a byte for every text id, where its table has fewer: a server says what it
    generates, and random weights generate any id."""
    from emu35.tokens.text import ByteTokenizer

    class Speaking(ByteTokenizer):
        def decode_bytes(self, ids: Iterable[int]) -> bytes:
            n_text = self.vocabulary.n_text
            return super().decode_bytes(id % 256 if id < n_text else id for id in ids)

        def decode(self, ids: Iterable[int]) -> str:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")

    return Speaking(vocabulary=tokenizer.vocabulary)


def mixed(place: int, *, quick: bool) -> tuple[str, dict[str, Any]]:
    """Call ``place`` of the crowd: its path and body, always the same."""
    rng = random.Random(place)
    small, large, words = (2, 4, 12) if quick else (4, 14, 96)
    size = f"{rng.randint(small, large)}x{rng.randint(small, large)}"
    prompt = f"call {place}: " + "a picture of a hen " * rng.randint(1, 4)
    common: dict[str, Any] = {"seed": place, "stream": place % 3 == 0, "return_token_ids": True}
    ask = {"messages": [{"role": "user", "content": prompt}], "return_images": False}
    if place % 4 == 3:
        tokens = rng.randint(words // 2, words)
        return "/v1/completions", {
            "prompt": prompt, "max_tokens": tokens, "max_images": 0, **common,
        }  # fmt: skip
    if place % 4 == 2:
        return "/v1/chat/completions", {**ask, "task": "story", "max_tokens": words, **common}
    return "/v1/chat/completions", {**ask, "task": "t2i", "size": size, **common}


def send(client: httpx.Client, call: tuple[str, dict[str, Any]]) -> int:
    """Tokens of the answer.

    Raises:
        RuntimeError: it is no whole answer.
    """
    path, body = call
    answer = client.post(path, json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.text[:200]}")
    if not body["stream"]:
        return answer.json()["usage"]["completion_tokens"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line.startswith("{")]
    if lines[-1] != "[DONE]" or any("error" in chunk for chunk in chunks):
        raise RuntimeError(f"a stream ended with {lines[-1][:200]}")
    return sum(len(c.get("token_ids", [])) for chunk in chunks for c in chunk["choices"])


def crowd(
    client: httpx.Client, calls: list[tuple[str, dict[str, Any]]], *, at_once: int
) -> dict[str, Any]:
    """Send ``calls``, so many at a time: seconds, tokens, tokens a second, failures."""
    failures: list[str] = []

    def one(call: tuple[str, dict[str, Any]]) -> int:
        try:
            return send(client, call)
        except (RuntimeError, httpx.HTTPError, ValueError) as error:
            failures.append(f"{type(error).__name__}: {error}")
            return 0

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        tokens = sum(pool.map(one, calls))
    seconds = time.perf_counter() - began
    for failure in failures[:3]:
        print(failure, file=sys.stderr)
    return {
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "rate": round(tokens / seconds, 1),
        "failures": len(failures),
    }


if __name__ == "__main__":
    sys.exit(main())
