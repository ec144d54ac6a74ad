"""The endpoints."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu35 import __version__
from emu35.errors import ConfigError, Emu35Error
from emu35.inference.request import Request as EngineRequest
from emu35.stages.serve.answering import Answering, unless_gone
from emu35.stages.serve.asking import new_seed
from emu35.stages.serve.bodies import RefusedBodies
from emu35.stages.serve.calls import Call
from emu35.stages.serve.protocol import ChatBody, CompletionBody, Look
from emu35.stages.serve.refusal import SERVER, Refusal
from emu35.stages.serve.service import Service
from emu35.stages.serve.weights_app import WEIGHTS, add_weights
from emu35.stages.serve.wire import ChatWire, CompletionWire, Json, Wire
from emu35.tokens.template import ASPECT_RATIOS, TASKS

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The page may talk to this server and to nobody else, and no other page may frame it."""


def build_app(service: Service) -> ASGIApp:
    """The ASGI application over ``service``."""
    app = FastAPI(
        title="emu35",
        version=__version__,
        docs_url=None,  # these pages would fetch their scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _add_generation(app, service)
    _add_information(app, service)
    add_weights(app, service)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _not_here)
    app.add_exception_handler(Exception, _bug)
    return _Watched(RefusedBodies(app), service=service)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(COMPLETIONS, openapi_extra=_takes(CompletionBody))
    async def completions(request: Request) -> Response:
        service.check_door(request)
        return await _generate(service, request, asked=_completion(service, request))

    @app.post(CHAT, openapi_extra=_takes(ChatBody))
    async def chat(request: Request) -> Response:
        service.check_door(request)
        return await _generate(service, request, asked=_chat(service, request))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What is left of a body once it is read: of a picture, its codes."""

    requests: list[EngineRequest]
    look: Look
    wire: Wire


async def _completion(service: Service, request: Request) -> _Asked:
    asker = service.asker
    async with service.bodies.read(request, CompletionBody) as body:
        service.check_model(body.model)
        seed = new_seed() if body.seed is None else body.seed
        requests = await asyncio.to_thread(asker.completion, body, seed=seed)
        look = body.look
    wire = CompletionWire(look, tokenizer=asker.tokenizer, model=service.name, seed=seed)
    return _Asked(requests=requests, look=look, wire=wire)


async def _chat(service: Service, request: Request) -> _Asked:
    asker = service.asker
    async with service.bodies.read(request, ChatBody) as body:
        service.check_model(body.model)
        seed = new_seed() if body.seed is None else body.seed
        requests = await asker.chat(body, pictures=service.pictures, seed=seed)
        look = body.look
    _check_shown(service, look, requests)
    wire = ChatWire(look, tokenizer=asker.tokenizer, model=service.name, seed=seed)
    return _Asked(requests=requests, look=look, wire=wire)


async def _generate(service: Service, request: Request, *, asked: Awaitable[_Asked]) -> Response:
    """Ask the engine and answer, in one piece or as a stream."""
    try:
        found = await asked
    except ConfigError as error:
        raise Refusal("; ".join(error.problems)) from error
    except Emu35Error as error:
        raise Refusal(str(error)) from error
    call = await service.submit(found.requests)
    # While it runs they stay the same: an update waits until nothing is in flight.
    found.wire.weights = service.weights.tag
    answering = Answering(
        call,
        look=found.look,
        requests=found.requests,
        tokenizer=service.asker.tokenizer,
        pictures=service.pictures,
        wire=found.wire,
    )
    if found.look.stream:
        return _EventStream(answering)
    try:
        work = asyncio.create_task(answering.whole())
        answer = await unless_gone(work, gone=asyncio.create_task(_disconnected(request)))
    except Emu35Error as error:  # a picture that cannot be decoded: diverged tokenizer weights
        raise Refusal(str(error), status=500, type=SERVER) from error
    finally:
        call.close()
    return Response(status_code=499) if answer is None else JSONResponse(answer)


def _check_shown(service: Service, look: Look, requests: Sequence[EngineRequest]) -> None:
    """Refuse to draw what could not be shown, unless only ids are wanted."""
    if look.return_images and not service.pictures.available and requests[0].grammar.images:
        raise Refusal(
            "this server has no image tokenizer, so it shows no pictures; start it with --vision "
            "DIR, or ask for ids with return_images=false and return_token_ids=true",
            code="no_image_tokenizer",
        )


class _EventStream(StreamingResponse):
    """Server-sent events of a call, which ends with the connection."""

    def __init__(self, answering: Answering) -> None:
        # Proxies that buffer would turn a stream into a lump.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answering.stream(), media_type="text/event-stream", headers=headers)
        self._call: Call = answering.call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


async def _disconnected(request: Request) -> None:
    """Wait until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Json:
        service.check_key(request)
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Json:
        service.check_key(request)
        service.check_model(name)
        return _model(service)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        found = service.health
        body = {"status": found.status, "model": service.name}
        if found.reason is not None:
            body["reason"] = found.reason
        return JSONResponse(body, status_code=200 if found.ok else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.head("/", include_in_schema=False)
    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers={"Content-Security-Policy": _PAGE_POLICY})


def _model(service: Service) -> Json:
    """The model as OpenAI lists it, and what a page needs to know of it."""
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "emu35",
        "max_model_len": service.asker.max_length,
        "template": service.asker.template.value,
        "images": service.pictures.available,
        "pixels_per_code": service.pictures.factor,
        "max_references": service.options.limits.max_references,
        "ratios": {name: list(shape or ()) for name, shape in ASPECT_RATIOS.items()},
        "tasks": {
            task.value: {
                "guidance": numbers.guidance,
                "one_image": numbers.one_image,
                "images": numbers.images,
            }
            for task, numbers in TASKS.items()
        },
    }


@cache
def _page() -> str:
    """The page with its style and its script inside: one request, and nothing from elsewhere."""
    folder = resources.files("emu35.stages.serve").joinpath("page")
    style, script, page = (
        folder.joinpath(name).read_text("utf-8") for name in ("style.css", "app.js", "index.html")
    )
    return page.replace("/*style*/", style).replace("/*script*/", script)


def _takes(form: type[BaseModel]) -> dict[str, Any]:
    """The body of an endpoint for ``/openapi.json``; we read bodies ourselves."""
    schema = form.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse(error.plain(), status_code=error.status, headers=error.headers)


async def _not_here(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    refusal = Refusal(
        f"{request.method} {request.url.path}: {error.detail}; there are {COMPLETIONS}, {CHAT}, "
        "/v1/models, /health, /metrics, /weights and the page at /",
        status=error.status_code,
    )
    return JSONResponse(refusal.plain(), status_code=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """uvicorn logs the traceback, which whoever asked does not see."""
    refusal = Refusal(
        f"{type(error).__name__} in the server: a bug; its log has more", status=500, type=SERVER
    )
    return JSONResponse(refusal.plain(), status_code=500)


_ENDPOINTS = frozenset(
    {COMPLETIONS, CHAT, "/v1/models", "/health", "/metrics", "/"}
    | {WEIGHTS, f"{WEIGHTS}/begin", f"{WEIGHTS}/bucket", f"{WEIGHTS}/commit"}
)


class _Watched:
    """ASGI middleware: counts calls by endpoint and status, and those that are open."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "499"  # nginx's number for a client that left before its answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        path: str = scope["path"]
        generates = path in (COMPLETIONS, CHAT)
        self._service.open_calls += generates
        try:
            await self._app(scope, receive, noting)
        finally:
            self._service.open_calls -= generates
            endpoint = path if path in _ENDPOINTS else "other"
            self._service.metrics.calls.labels(endpoint, status).inc()
