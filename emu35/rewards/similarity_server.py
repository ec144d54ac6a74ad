"""A server of the protocol of :mod:`emu35.rewards.similarity_endpoint` around any reward.

So one machine with a model serves many trainers::

    reward = build_rewards({"clip": config})["clip"]
    similarity_server(reward, host="0.0.0.0", port=8100).serve_forever()
"""

import base64
import binascii
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from emu35.rewards.call import checked, told
from emu35.rewards.sample import Picture, Reward, Sample, Unscored
from emu35.rewards.similarity_endpoint import PATH

MOST_BYTES = 256 * 2**20
"""Longest request that is read."""

_PREFIX = "data:image/png;base64,"


def similarity_server(reward: Reward, *, host: str, port: int) -> ThreadingHTTPServer:
    """A server at ``host`` and ``port`` (0: any that is free); ``serve_forever`` runs it."""

    class Handler(_Handler):
        judge = reward

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    judge: Reward
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True
            self._answer(413, {"error": f"needs a content-length of at most {MOST_BYTES}"})
            return
        body = self.rfile.read(int(length))
        if self.path.rstrip("/").rpartition("/")[2] != PATH:
            self._answer(404, {"error": f"{self.path} is not served; {PATH} is"})
            return
        try:
            samples = [_sample(pair) for pair in json.loads(body)["pairs"]]
        except (ValueError, KeyError, TypeError, UnidentifiedImageError, OSError) as error:
            self._answer(400, {"error": f"{type(error).__name__}: {error}"})
            return
        try:
            scores = checked(self.judge.score(samples), of=len(samples))
        # Whatever the reward raises, the server lives on and the client hears of it.
        except Exception as error:
            self._answer(500, {"error": told(error)})
            return
        self._answer(
            200,
            {
                "scores": [
                    {"unscored": score.reason} if isinstance(score, Unscored) else score
                    for score in scores
                ]
            },
        )

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line each."""

    def _answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _sample(pair: Any) -> Sample:
    return Sample(
        record={},
        task="t2i",
        prompt=str(pair["text"]),
        texts=("", ""),
        pictures=[_picture(pair["image"])],
    )


def _picture(url: str) -> Picture:
    if not url.startswith(_PREFIX):
        raise ValueError(f"an image must be a data URL that begins with {_PREFIX}")
    try:
        content = base64.b64decode(url.removeprefix(_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image is no base64: {error}") from error
    return np.asarray(Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGB"))
