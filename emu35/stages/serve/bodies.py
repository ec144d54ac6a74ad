"""Reading a body without trusting it: its type, its size while it comes, its form."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu35.stages.serve.refusal import Refusal, invalid_body

Form = TypeVar("Form", bound=BaseModel)

_SILENCE = 60.0
"""Seconds without a byte after which a body is given up."""

_SLOWEST = 2**17
"""Bytes a second that a body must come at, on average, after its first ``_SILENCE`` seconds: one
that drips would keep its place among the open calls for ever."""

_AT_ONCE = 8
"""Times the size of the largest body: what all bodies together may hold that are being read, or
have been but are not requests yet."""

_SMALL = 2**16
"""Bytes of a body that is parsed in passing; a larger one would keep the event loop from others."""

_OTHER_COMMAS = 2**20
"""Commas of a body beside those between token ids: of texts and objects."""

_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 64 * 2**20


class Bodies:
    """The bodies being read by one server: ``largest`` in bytes, with ``most_ids`` at most."""

    def __init__(self, *, largest: int, most_ids: int) -> None:
        self._largest = largest
        self._most_commas = most_ids + _OTHER_COMMAS
        self._held = 0
        self._parsing = ThreadPoolExecutor(1, thread_name_prefix="bodies")

    def close(self) -> None:
        """Let the worker go."""
        self._parsing.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def read(self, request: Request, form: type[Form]) -> AsyncIterator[Form]:
        """The body of ``request`` as ``form``, which counts as held until the block ends.

        Raises:
            Refusal: 415, 413 (as soon as it is known), 408, 429 or 400.
        """
        self._check_head(request)
        with self._hold() as hold:
            content = await self._content(request, hold)
            self._check_commas(content)
            if len(content) <= _SMALL:
                body = _parse(content, form)
            else:
                loop = asyncio.get_running_loop()
                body = await loop.run_in_executor(self._parsing, _parse, content, form)
            del content
            yield body

    @contextmanager
    def _hold(self) -> Iterator[Callable[[int], None]]:
        """Gives what counts so many bytes more as held, until the block ends."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held += size

        try:
            yield hold
        finally:
            self._held -= held

    @asynccontextmanager
    async def raw(self, request: Request) -> AsyncIterator[bytearray]:
        """The bytes of ``request``, which count as held until the block ends.

        Raises:
            Refusal: as :meth:`read`.
        """
        self._check_head(request, wanted="application/octet-stream")
        with self._hold() as hold:
            yield await self._content(request, hold)

    def _check_head(self, request: Request, *, wanted: str = "application/json") -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wanted:
            # A browser asks before it sends these to another site, and never for a plain form.
            raise Refusal(f"content type {kind or 'missing'!r}; send {wanted}", status=415)
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._largest:
            raise self._too_large(int(declared))

    async def _content(self, request: Request, hold: Callable[[int], None]) -> bytearray:
        content = bytearray()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(_SILENCE) as patience:
                async for chunk in request.stream():
                    content += chunk
                    hold(len(chunk))
                    self._check_size(content)
                    earned = begun + len(content) / _SLOWEST
                    patience.reschedule(_SILENCE + min(loop.time(), earned))
        except TimeoutError:
            raise Refusal(
                f"the body came too slowly: no byte for {_SILENCE:g} seconds, or less than "
                f"{_SLOWEST} a second after the first {_SILENCE:g}; send it in one go",
                status=408,
            ) from None
        except ClientDisconnect:
            raise Refusal("the client went away", status=499) from None
        return content

    def _check_size(self, content: bytearray) -> None:
        if len(content) > self._largest:
            raise self._too_large(len(content))
        if self._held > _AT_ONCE * self._largest:
            raise Refusal(
                "too many large bodies are being read; try again in a second",
                status=429,
                type="rate_limit_error",
                headers={"Retry-After": "1"},
            )

    def _check_commas(self, content: bytearray) -> None:
        """Refuse millions of values before they are made: a parser keeps the interpreter's lock,
        and whatever it makes takes many times the memory of its text."""
        commas = content.count(b",")
        if commas > self._most_commas:
            raise Refusal(
                f"the body has {commas} commas, so about as many values; this server reads at most "
                f"{self._most_commas}: send fewer or shorter prompts in one call",
                status=413,
                code="body_too_large",
            )

    def _too_large(self, size: int) -> Refusal:
        return Refusal(
            f"a body of {size} bytes or more; this server takes at most {self._largest}: send "
            "fewer or smaller pictures, or start it with a larger --max-body-mb",
            status=413,
            code="body_too_large",
        )


def _parse(content: bytearray, form: type[Form]) -> Form:
    try:
        return form.model_validate_json(content)
    except ValidationError as error:
        raise invalid_body(error, model=form) from None


class RefusedBodies:
    """ASGI middleware: let a client that is still sending read why it was refused.

    Closing a connection with unread bytes resets it, and the answer may be lost with it. So the
    answer is flushed first, and for a moment what still comes is read and thrown away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        whole = False

        async def counting() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)
            return message

        status = 200

        async def answering(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            ends = message["type"] == "http.response.body" and not message.get("more_body", False)
            if ends and status >= 400 and not whole:
                await send({**message, "more_body": True})
                await _drain(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(scope, counting, answering)


async def _drain(receive: Receive) -> None:
    read = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while read < _DRAIN_BYTES:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return  # it had its moment
