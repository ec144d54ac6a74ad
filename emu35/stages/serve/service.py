"""What the endpoints share: the model's tools, the door, and how the server is."""

import asyncio
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from starlette.requests import Request as HttpRequest

from emu35.errors import ConfigError, QueueFull
from emu35.inference.engine import Engine
from emu35.inference.request import Request
from emu35.stages.serve.answering import engine_failed
from emu35.stages.serve.asking import Asker
from emu35.stages.serve.bodies import Bodies
from emu35.stages.serve.calls import Call, EngineFailure
from emu35.stages.serve.engine_thread import EngineThread
from emu35.stages.serve.metrics import Metrics
from emu35.stages.serve.options import ALIAS, ServeOptions
from emu35.stages.serve.pictures import Pictures
from emu35.stages.serve.protocol import MOST_CHOICES
from emu35.stages.serve.refusal import SERVER, Refusal, shown
from emu35.stages.serve.weights import WeightUpdates
from emu35.vision.codec import ImageCodec

_CLOSE_SECONDS = 5.0
"""How long aborted answers have to reach their clients."""


class Phase(StrEnum):
    """Where the server is in its life."""

    starting = "starting"
    ready = "ready"
    draining = "draining"


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """``status`` is ok, or why no requests should be sent; ``reason`` says more."""

    status: str
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether requests are welcome."""
        return self.status == "ok"


class Service:
    """Made in the event loop. ``name`` is what clients call the model; ``make_engine`` and
    ``open_codec`` are slow and run in threads when :meth:`start` is awaited."""

    def __init__(
        self,
        *,
        name: str,
        options: ServeOptions,
        asker: Asker,
        make_engine: Callable[[], Engine],
        open_codec: Callable[[], ImageCodec | None],
    ) -> None:
        self.name = name
        self.options = options
        self.asker = asker
        self.metrics = Metrics()
        self.bodies = Bodies(
            largest=options.limits.body_bytes,
            most_ids=(MOST_CHOICES + 1) * asker.max_length,  # and the unconditional prompt
        )
        self.pictures = Pictures(None, limits=options.limits)
        self.engine = EngineThread(make_engine, metrics=self.metrics)
        self.weights = WeightUpdates(self.engine)
        self.buckets = Bodies(largest=options.max_bucket_mb * 2**20, most_ids=0)
        self.metrics.watch(lambda: self.engine.stats)
        self.phase = Phase.starting
        self.open_calls = 0
        self._open_codec = open_codec
        self._key = options.api_key()

    async def start(self) -> None:
        """Load everything; calls are answered afterwards.

        Raises:
            Whatever loading the image tokenizer or the model raises.
        """
        codec = await asyncio.to_thread(self._open_codec)
        self.pictures = Pictures(codec, limits=self.options.limits)
        await self.engine.start()
        if self.phase is Phase.starting:
            self.phase = Phase.ready

    async def drain(self, *, hurry: asyncio.Event) -> None:
        """Take nothing new, let what runs finish within the grace time or until ``hurry``, and
        abort the rest."""
        self.phase = Phase.draining
        await self._until_idle(self.options.grace, hurry=hurry)
        self.engine.abort_all()
        await self._until_idle(_CLOSE_SECONDS, hurry=asyncio.Event())

    async def close(self) -> None:
        """End the threads."""
        await self.engine.stop()
        self.pictures.close()
        self.bodies.close()
        self.buckets.close()

    async def _until_idle(self, seconds: float, *, hurry: asyncio.Event) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self.open_calls and not hurry.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.05))

    @property
    def health(self) -> Health:
        """Whether requests are welcome, and why not."""
        if self.phase is Phase.starting:
            return Health(status="starting", reason="the model is being loaded")
        if self.phase is Phase.draining:
            return Health(status="draining", reason="the server is being shut down")
        if (update := self.weights.update) is not None:
            return Health(status="updating", reason=update)
        if self.engine.failure is not None:
            return Health(status="unhealthy", reason=self.engine.failure)
        return Health(status="ok")

    def check_door(self, request: HttpRequest) -> None:
        """Refuse whoever may not come in now, before anything is read.

        Raises:
            Refusal: 401, 503 or 429.
        """
        self.check_key(request)
        self.check_phase()
        self.weights.check_whole()
        options = self.options
        if self.open_calls > options.max_requests + options.max_waiting:
            raise self._full(f"{self.open_calls} calls are open")

    def check_phase(self) -> None:
        """Refuse while the server is not up, or not any more.

        Raises:
            Refusal: 503.
        """
        if self.phase is not Phase.ready:
            health = self.health
            raise Refusal(
                f"the server is {health.status}: {health.reason}; try again later",
                status=503,
                type=SERVER,
                code=health.status,
                headers={"Retry-After": "10"},
            )

    def check_key(self, request: HttpRequest) -> None:
        """Refuse whoever has not the API key, where one is asked for.

        Raises:
            Refusal: 401.
        """
        if self._key is None:
            return
        sent = request.headers.get("authorization", "")
        if not hmac.compare_digest(sent.encode(), f"Bearer {self._key}".encode()):
            raise Refusal(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_model(self, name: str | None) -> None:
        """Refuse a call for another model; none, and the :data:`~.options.ALIAS`, mean ours.

        Raises:
            Refusal: 404.
        """
        if name not in (None, self.name, ALIAS):
            raise Refusal(
                f"model {shown(name)} is not served here; use {shown(self.name)}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def submit(self, requests: Sequence[Request]) -> Call:
        """Hand ``requests`` to the engine.

        Raises:
            Refusal: they can never run (400), the line is full (429), the weights are being
                replaced (503), or the engine is broken.
        """
        # An update may have begun while the body was being read.
        self.weights.check_whole()
        most = self.options.max_requests + self.options.max_waiting
        if len(requests) > most:
            raise Refusal(
                f"{len(requests)} answers in one call; this server holds {most}: ask for fewer",
                param="n",
            )
        try:
            return await self.engine.submit(requests)
        except ConfigError as error:
            raise Refusal("; ".join(error.problems)) from error
        except QueueFull as error:
            raise self._full(str(error)) from error
        except EngineFailure as error:
            raise engine_failed(error) from error

    def _full(self, what: str) -> Refusal:
        seconds = self.engine.retry_after
        return Refusal(
            f"{what}; this server runs {self.options.max_requests} requests at a time and lets "
            f"{self.options.max_waiting} wait: try again in {seconds} seconds",
            status=429,
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )
