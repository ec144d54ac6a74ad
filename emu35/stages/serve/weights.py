"""Which weights are served, and how others take their place.

A trainer begins an update, sends its weights in buckets (:mod:`emu35.checkpoint.buckets`) and
commits. They are written straight into the model in use, as there is rarely room for two, so from
the beginning of an update to its commit nothing is generated: requests in flight end first, and
others are refused. That holds however an update ends. A trainer that dies half-way, a bucket that
does not belong here, an engine that fails: the server answers nothing until a whole update came.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from emu35.checkpoint.buckets import INITIAL, Bucket, decode, weights_tag
from emu35.errors import Emu35Error
from emu35.inference.engine import Engine
from emu35.stages.serve.calls import EngineFailure
from emu35.stages.serve.engine_thread import EngineThread, describe, report
from emu35.stages.serve.refusal import SERVER, Refusal

T = TypeVar("T")

_LOOK_AGAIN = 0.02
"""Seconds between two looks whether the engine is idle."""


class InFlight(StrEnum):
    """What becomes of requests in flight when an update begins."""

    finish = "finish"
    abort = "abort"


@dataclass(kw_only=True, slots=True)
class _Update:
    """One that is under way. ``digests`` are those of the buckets that were written."""

    session: str
    version: int
    ready: bool = False
    broken: str | None = None
    digests: list[str] = field(default_factory=list[str])


class WeightUpdates:
    """The weights of ``engine``; ``tag`` says which they are."""

    def __init__(self, engine: EngineThread) -> None:
        self.tag = INITIAL
        self._engine = engine
        self._update: _Update | None = None
        self._order = asyncio.Lock()

    @property
    def update(self) -> str | None:
        """Why nothing is answered now; None while all is well."""
        if self._update is None:
            return None
        came = f"an update of the weights to version {self._update.version} is under way"
        return f"{came} ({len(self._update.digests)} buckets came)"

    def check_whole(self) -> None:
        """Refuse while an update is under way.

        Raises:
            Refusal: 503.
        """
        if (reason := self.update) is not None:
            raise Refusal(
                f"{reason}; try again when it is committed",
                status=503,
                type=SERVER,
                code="weights_updating",
                headers={"Retry-After": "1"},
            )

    async def begin(self, version: int, *, in_flight: InFlight) -> str:
        """Take nothing new, wait until nothing is in flight, and be ready for buckets; the update's
        name. It takes the place of one that was begun before.

        Raises:
            Refusal: another update was begun meanwhile, or the engine is broken.
        """
        update = _Update(session=secrets.token_hex(8), version=version)
        self._update = update
        if in_flight is InFlight.abort:
            self._engine.abort_all()
        async with self._order:
            while await self._asked(lambda engine: engine.busy):
                await asyncio.sleep(_LOOK_AGAIN)
            self._current(update.session)
            await self._asked(lambda engine: engine.begin_weights())
            update.ready = True
        return update.session

    async def bucket(self, content: bytearray, *, session: str, digest: str) -> int:
        """Write the next bucket; its number. The one that was written last may come again, as its
        answer may have been lost.

        Raises:
            Refusal: 409 where no such update is under way, 400 where the bucket is damaged or does
                not belong here.
        """
        async with self._order:
            update = self._ready(session)
            try:
                bucket = decode(content)
                found = await asyncio.to_thread(bucket.digest)
            except Emu35Error as error:
                raise _damaged(str(error)) from error
            index = bucket.layout.index
            if found != digest:
                raise _damaged(f"bucket {index} has SHA-256 {found}, not {digest}")
            if index == len(update.digests) - 1 and found == update.digests[-1]:
                return index
            if index != len(update.digests):
                raise Refusal(
                    f"bucket {index} came where {len(update.digests)} is the next; send them in "
                    "order",
                    status=409,
                    code="bucket_out_of_order",
                )
            await self._write(bucket, update=update)
            update.digests.append(found)
            return index

    async def _write(self, bucket: Bucket, *, update: _Update) -> None:
        try:
            await self._engine.work(lambda engine: engine.write_weights(bucket))
        except Emu35Error as error:  # said before anything was written
            raise Refusal(str(error), code="bucket_misfit") from error
        except Exception as error:
            report("a bucket of weights could not be written", error)
            update.broken = describe(error)
            raise _failed(update.broken) from error

    async def commit(self, *, session: str, tag: str) -> str:
        """All has come: serve the new weights; their tag, which must be the trainer's.

        Raises:
            Refusal: 409 where something is missing; the update stays under way.
        """
        async with self._order:
            if self._update is None and tag == self.tag:
                return tag  # the answer to the first commit was lost
            update = self._ready(session)
            found = weights_tag(update.version, update.digests)
            if found != tag:
                raise Refusal(
                    f"the buckets that came are {found}, not {tag}; begin again",
                    status=409,
                    code="weights_differ",
                )
            try:
                await self._engine.work(lambda engine: engine.finish_weights())
            except Emu35Error as error:
                raise Refusal(str(error), status=409, code="weights_incomplete") from error
            except EngineFailure as error:
                raise _failed(str(error)) from error
            self.tag, self._update = found, None
            return found

    async def _asked(self, function: Callable[[Engine], T]) -> T:
        """What ``function`` gives of the engine."""
        try:
            return await self._engine.work(function)
        except EngineFailure as error:
            raise _failed(str(error)) from error

    def _current(self, session: str) -> _Update:
        """The update under way, which must be ``session``."""
        if self._update is None or self._update.session != session:
            raise Refusal(
                f"update {session!r} is not under way (another one may have begun since); begin "
                "again",
                status=409,
                code="no_such_update",
            )
        return self._update

    def _ready(self, session: str) -> _Update:
        update = self._current(session)
        if update.broken is not None or not update.ready:
            raise Refusal(
                f"update {session!r} cannot go on: {update.broken or 'it waits to begin'}; begin "
                "again",
                status=409,
                code="update_broken",
            )
        return update


def _damaged(what: str) -> Refusal:
    return Refusal(f"{what}; nothing was written: send it again", code="bucket_damaged")


def _failed(what: str) -> Refusal:
    return Refusal(what, status=500, type=SERVER, code="engine_failure")
