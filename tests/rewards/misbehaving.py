"""A loopback server that answers as each test wants, well or badly, and remembers what it got."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class Got:
    """A request: when it came, where to, its headers and its JSON."""

    when: float
    path: str
    headers: dict[str, str]
    body: Any


Behaviour = Callable[["Handler"], None]
"""Answers a request on the handler, or does not."""


@dataclass(kw_only=True)
class Misbehaving:
    """The server at ``url``. Requests are answered by the first of ``behaviours`` that is left,
    and by the last one from then on. ``over`` is set when the test is."""

    url: str
    behaviours: list[Behaviour]
    got: list[Got] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    owner: Misbehaving
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        owner = self.owner
        with owner.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            owner.got.append(
                Got(when=time.monotonic(), path=self.path, headers=headers, body=json.loads(body))
            )
            more = len(owner.behaviours) > 1
            behave = owner.behaviours.pop(0) if more else owner.behaviours[0]
        behave(self)

    def log_message(self, format: str, *args: object) -> None:
        """Tests look at what was got."""

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def misbehaving(*behaviours: Behaviour) -> Iterator[Misbehaving]:
    """Run the server in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    owner = Misbehaving(url=f"http://127.0.0.1:{server.server_port}/v1", behaviours=[*behaviours])
    server.RequestHandlerClass = type("Own", (Handler,), {"owner": owner})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield owner
    finally:
        owner.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, content: bytes = b"no", **headers: str) -> Behaviour:
    return lambda handler: handler.send(code, content, **headers)


def says(reply: str, *, finish: str = "stop") -> Behaviour:
    """A chat completion."""
    message = {"role": "assistant", "content": reply}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return status(200, json.dumps(body).encode())


def hangs(handler: Handler) -> None:
    """No answer until the test is over."""
    handler.owner.over.wait(30)
    handler.close_connection = True


def trickles(handler: Handler) -> None:
    """A byte now and then, never the last one."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.owner.over.wait(0.05):
        try:
            handler.wfile.write(b" ")
        except OSError:
            break
    handler.close_connection = True


def breaks_off(handler: Handler) -> None:
    """Half of an answer, then nobody is there."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"message": {"content": "{\\"score\\": 9')
    handler.close_connection = True


def hangs_up(handler: Handler) -> None:
    """No answer, and nobody is there."""
    handler.close_connection = True
