"""JSON to a server and back, with every way in which that fails told apart.

A call ends within its time whatever the server does: a body that trickles in is given up as one
that never comes. What would fail again (a wrong key, an unknown model) is not repeated, what may
pass (overload, a broken connection, an answer that is no JSON) is, and a server that asks to be
left alone for a while (``Retry-After``) is.
"""

import base64
import email.utils
import io
import json
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from PIL import Image

from emu35.config.reward_remote import EndpointRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.call import RewardFailed
from emu35.rewards.sample import Picture

if TYPE_CHECKING:
    import httpx

PASSING = frozenset({408, 425, 429})
"""Refusals (4xx) that may pass; the others stay, and errors of the server (5xx) may pass too."""

MOST_BYTES = 2**20
"""Longest body that is read; a score takes far less."""

WITHIN = 0.95
"""The share of a call's time after which its request is given up, so that the pool of rewards sees
it end by itself."""


class Endpoint:
    """The server of a reward. Several threads may use it at once.

    Raises:
        ConfigError: httpx is missing, or the variable that should hold the key does.
    """

    def __init__(self, config: EndpointRewardConfig) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ConfigError(
                f"reward kind {config.kind} asks a server and needs httpx; install emu35[grpo]"
            ) from error
        self._seconds = WITHIN * config.timeout
        self._url = config.base_url.rstrip("/")
        self._key = _key(config.api_key_env)
        self._key_from = config.api_key_env
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        most = config.concurrency
        self._client = httpx.Client(
            headers=headers,
            timeout=self._seconds,
            # A redirect would take the key and the pictures to somebody else.
            follow_redirects=False,
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
        )

    def post(self, path: str, *, body: Any) -> Any:
        """The JSON that the server answers to ``body``.

        Raises:
            RewardFailed: it gave none, for whichever reason.
        """
        import httpx

        url = f"{self._url}/{path}"
        end = time.monotonic() + self._seconds
        try:
            with self._client.stream("POST", url, json=body) as response:
                content = self._read(response, end=end)
        except httpx.TimeoutException as error:
            raise self._too_slow() from error
        except httpx.HTTPError as error:
            raise RewardFailed(f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise self._refused(response, content=content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RewardFailed(
                f"{url} answered what is no JSON: {self._excerpt(content)}"
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _read(self, response: "httpx.Response", *, end: float) -> bytes:
        content = b""
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() > end:
                raise self._too_slow()
            if len(content) > MOST_BYTES:
                raise RewardFailed(f"{self._url} answered more than {MOST_BYTES} bytes")
        return content

    def _too_slow(self) -> RewardFailed:
        return RewardFailed(
            f"{self._url}: no whole answer within {self._seconds:g} s", timed_out=True
        )

    def _refused(self, response: "httpx.Response", *, content: bytes) -> RewardFailed:
        status = response.status_code
        hint = ""
        if status in (401, 403):
            hint = (
                f"; is the key in {self._key_from} right?"
                if self._key_from
                else "; it may need a key: name the variable that holds it in api_key_env"
            )
        return RewardFailed(
            f"{self._url} answered {status}: {self._excerpt(content)}{hint}",
            repeat=status >= 500 or status in PASSING,
            after=_retry_after(response.headers.get("retry-after")),
        )

    def _excerpt(self, content: bytes) -> str:
        """The beginning of a body on one line, without the key should the server repeat it."""
        text = content[:2000].decode(errors="replace")
        if self._key:
            text = text.replace(self._key, "***")
        return repr(text[:200])


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"api_key_env={variable}: that variable is not set; set it to the key")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"api_key_env={variable}: the key in it has characters that none has")
    return key


def _retry_after(header: str | None) -> float | None:
    """Seconds from now; None where the header is missing or makes no sense."""
    if header is None:
        return None
    try:
        return max(0.0, float(int(header)))
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def data_url(picture_HW3: Picture) -> str:
    """A picture, RGB [H, W, 3], as a PNG in a data URL."""
    stream = io.BytesIO()
    Image.fromarray(picture_HW3).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
