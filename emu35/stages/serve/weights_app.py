"""The endpoints under ``/weights``, by which a trainer replaces the weights (``--weight-updates``).

``POST /weights/begin`` ``{"version": 7, "in_flight": "finish"}`` answers ``{"update": NAME}`` when
nothing is in flight any more. ``POST /weights/bucket`` takes one encoded bucket
(:func:`emu35.checkpoint.buckets.encode`), with its update and its SHA-256 in two headers.
``POST /weights/commit`` ``{"update": NAME, "weights": TAG}`` serves what came. ``GET /weights``
tells which weights are served, and whether they are being replaced.
"""

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request

from emu35.stages.serve.protocol import Body
from emu35.stages.serve.refusal import Refusal
from emu35.stages.serve.service import Service
from emu35.stages.serve.weights import InFlight
from emu35.stages.serve.wire import Json

WEIGHTS = "/weights"
UPDATE_HEADER = "X-Emu35-Update"
DIGEST_HEADER = "X-Emu35-SHA256"


class BeginBody(Body):
    """``POST /weights/begin``; ``version`` counts the trainer's updates."""

    version: int = Field(ge=0)
    in_flight: InFlight = InFlight.finish


class CommitBody(Body):
    """``POST /weights/commit``; ``weights`` is :func:`~.weights.weights_tag` of what was sent."""

    update: str
    weights: str


def add_weights(app: FastAPI, service: Service) -> None:
    """Add them to ``app``; where updates are not allowed they say so."""

    @app.get(WEIGHTS)
    async def weights(request: Request) -> Json:
        service.check_key(request)
        return {
            "weights": service.weights.tag,
            "updating": service.weights.update,
            "updates_allowed": service.options.weight_updates,
        }

    @app.post(f"{WEIGHTS}/begin")
    async def begin(request: Request) -> Json:
        _check_door(service, request)
        async with service.bodies.read(request, BeginBody) as body:
            version, in_flight = body.version, body.in_flight
        return {"update": await service.weights.begin(version, in_flight=in_flight)}

    @app.post(f"{WEIGHTS}/bucket")
    async def bucket(request: Request) -> Json:
        _check_door(service, request)
        async with service.buckets.raw(request) as content:
            index = await service.weights.bucket(
                content,
                session=request.headers.get(UPDATE_HEADER, ""),
                digest=request.headers.get(DIGEST_HEADER, ""),
            )
        return {"bucket": index}

    @app.post(f"{WEIGHTS}/commit")
    async def commit(request: Request) -> Json:
        _check_door(service, request)
        async with service.bodies.read(request, CommitBody) as body:
            session, tag = body.update, body.weights
        return {"weights": await service.weights.commit(session=session, tag=tag)}


def _check_door(service: Service, request: Request) -> None:
    service.check_key(request)
    service.check_phase()
    if not service.options.weight_updates:
        raise Refusal(
            "this server does not let its weights be replaced; start it with --weight-updates",
            status=403,
            code="weight_updates_forbidden",
        )
