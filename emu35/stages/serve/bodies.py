"""Reading a body without trusting it: its type, its size while it comes, its form."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu35.stages.serve.refusal import Refusal, invalid_body

Form = TypeVar("Form", bound=BaseModel)

_SILENCE = 60.0
"""Seconds without a byte after which a body is given up."""

_AT_ONCE = 8
"""Times the size of the largest body: what all unfinished bodies together may hold."""

_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 64 * 2**20


class Bodies:
    """The bodies being read by one server."""

    def __init__(self, *, largest: int) -> None:
        self._largest = largest
        self._held = 0

    async def read(self, request: Request, form: type[Form]) -> Form:
        """The body of ``request`` as ``form``.

        Raises:
            Refusal: 415, 413 (as soon as it is known), 408, 429 or 400.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A browser asks before it sends JSON to another site, and never for a plain form.
            raise Refusal(
                f"content type {kind or 'missing'!r}; send JSON as application/json", status=415
            )
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._largest:
            raise self._too_large(int(declared))
        content = await self._content(request)
        try:
            return form.model_validate_json(content)
        except ValidationError as error:
            raise invalid_body(error, model=form) from None

    async def _content(self, request: Request) -> bytes:
        content = bytearray()
        try:
            stream = request.stream()
            while chunk := await asyncio.wait_for(anext(stream, b""), _SILENCE):
                content += chunk
                self._held += len(chunk)
                if len(content) > self._largest:
                    raise self._too_large(len(content))
                if self._held > _AT_ONCE * self._largest:
                    raise Refusal(
                        "too many large bodies are being read; try again in a second",
                        status=429,
                        type="rate_limit_error",
                        headers={"Retry-After": "1"},
                    )
        except TimeoutError:
            raise Refusal(
                f"no byte of the body for {_SILENCE:g} seconds; send it in one go", status=408
            ) from None
        except ClientDisconnect:
            raise Refusal("the client went away", status=499) from None
        finally:
            self._held -= len(content)
        return bytes(content)

    def _too_large(self, size: int) -> Refusal:
        return Refusal(
            f"a body of {size} bytes or more; this server takes at most {self._largest}: send "
            "fewer or smaller pictures, or start it with a larger --max-body-mb",
            status=413,
            code="body_too_large",
        )


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
