"""From updates of the engine to an answer: whole, or as server-sent events.

Pictures are decoded beside the engine. A stream waits for its own picture, as order matters, and
loses nothing by it: what the engine does meanwhile lies in the call's queue, and of the progress in
there only the newest is shown.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from emu35.inference.progress import (
    Event,
    ImageBegun,
    ImageDone,
    ImageProgress,
    TextPiece,
    ThoughtPiece,
)
from emu35.inference.request import Generated, Request, Update
from emu35.stages.serve.calls import Call, EngineFailure
from emu35.stages.serve.engine_thread import describe, report
from emu35.stages.serve.pictures import Codes, Pictures
from emu35.stages.serve.pieces import Pieces
from emu35.stages.serve.protocol import EVERY_EIGHTH, Look
from emu35.stages.serve.refusal import SERVER, Refusal
from emu35.stages.serve.wire import Answer, Json, Piece, Wire
from emu35.tokens.text import TextTokenizer

_PATIENCE = 15.0
"""Seconds of silence after which a stream says that it is alive: proxies drop silent ones."""

_ALIVE = b": waiting\n\n"


class Answering:
    """One call being answered."""

    def __init__(
        self,
        call: Call,
        *,
        look: Look,
        requests: Sequence[Request],
        tokenizer: TextTokenizer,
        pictures: Pictures,
        wire: Wire,
    ) -> None:
        self.call = call
        self._look = look
        self._requests = requests
        self._pictures = pictures
        self._wire = wire
        self._show_images = look.return_images and pictures.available
        self._pieces = [Pieces(tokenizer, stop=request.stop) for request in requests]
        self._previewed = dict[tuple[int, int], int]()  # (place, image) -> rows shown

    async def whole(self) -> Json:
        """The answer when all of it is there.

        Raises:
            Refusal: the engine failed.
        """
        events: list[list[Event]] = [[] for _ in self._requests]
        try:
            async for place, update in self.call.updates():
                came = self._pieces[place].feed(update)
                events[place] += [e for e in came if not isinstance(e, ImageProgress)]
        except EngineFailure as error:
            raise engine_failed(error) from error
        answers = [
            await self._answer(request, pieces.finished, events=events[place])
            for place, (request, pieces) in enumerate(
                zip(self._requests, self._pieces, strict=True)
            )
        ]
        return self._wire.whole(answers)

    async def _answer(
        self, request: Request, generated: Generated | None, *, events: Sequence[Event]
    ) -> Answer:
        assert generated is not None
        answer = Answer(request=request, generated=generated)
        for event in events:
            if isinstance(event, ThoughtPiece):
                answer.thought += event.text
            elif isinstance(event, TextPiece):
                last = answer.parts[-1] if answer.parts else None
                if last is not None and last["type"] == "text":
                    last["text"] += event.text
                else:
                    answer.parts.append({"type": "text", "text": event.text})
            elif isinstance(event, ImageDone) and self._show_images:
                answer.parts.append(await self._image(event))
        return answer

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, ending with ``[DONE]``. A failure of the engine is an
        event with an ``error``, as the status has been sent by then."""
        try:
            for place in range(len(self._requests)):
                yield _event(self._wire.chunk(place, None, (), first=True))
            while self.call.running:
                updates = await self.call.next(patience=_PATIENCE)
                if not updates:
                    yield _ALIVE
                for place in sorted({place for place, _ in updates}):
                    mine = [update for at, update in updates if at == place]
                    async for chunk in self._chunks(place, mine):
                        yield _event(chunk)
            if self._look.include_usage:
                answers = [pieces.finished for pieces in self._pieces if pieces.finished]
                yield _event(self._wire.usage(self._requests, answers))
        except EngineFailure as error:
            yield _event(engine_failed(error).plain())
        except Exception as error:  # a picture that cannot be decoded; the status is sent already
            report("an answer could not be finished", error)
            yield _event(Refusal(describe(error), status=500, type=SERVER).plain())
        yield b"data: [DONE]\n\n"

    async def _chunks(self, place: int, updates: Sequence[Update]) -> AsyncIterator[Json]:
        pieces = self._pieces[place]
        events = [event for update in updates for event in pieces.feed(update)]
        tokens = [token for update in updates for token in update.tokens]
        wanted = self._look.return_token_ids or self._look.logprobs is not None
        newest = {e.number: e for e in events if isinstance(e, ImageProgress)}
        # Of a picture decoded in parallel everything comes at once.
        done = {e.number for e in events if isinstance(e, ImageDone)}
        for event in events:
            if isinstance(event, ImageProgress) and (
                event.number in done or newest[event.number] is not event
            ):
                continue
            piece = await self._piece(place, event)
            if piece is not None:
                yield self._wire.chunk(place, piece, tokens if wanted else ())
                tokens = []
        if tokens and wanted:
            # A part of a character, or of a row: nothing to show yet, but to count.
            yield self._wire.chunk(place, None, tokens)
        if pieces.finished is not None:
            yield self._wire.last(place, pieces.finished)

    async def _piece(self, place: int, event: Event) -> Piece | None:
        if isinstance(event, TextPiece):
            return Piece(text=event.text)
        if isinstance(event, ThoughtPiece):
            return Piece(thought=event.text)
        if isinstance(event, ImageBegun):
            progress = {"number": event.number, "rows_done": 0, "rows": event.size.height}
            return Piece(
                part={"type": "image_progress", **progress, "size": str(event.size)},
            )
        if isinstance(event, ImageProgress):
            part: Json = {
                "type": "image_progress",
                "number": event.number,
                "rows_done": event.rows_done,
                "rows": event.rows,
            }
            if self._preview_due(place, event):
                part["preview"] = await self._pictures.preview(event.codes_HW)
            return Piece(part=part)
        if isinstance(event, ImageDone) and self._show_images:
            return Piece(part=await self._image(event))
        return None

    def _preview_due(self, place: int, event: ImageProgress) -> bool:
        every = self._look.stream_previews
        if every == EVERY_EIGHTH:
            every = max(1, event.rows // 8)
        if not every or not self._show_images:
            return False
        key = (place, event.number)
        if event.rows_done - self._previewed.get(key, 0) < every:
            return False
        self._previewed[key] = event.rows_done
        return True

    async def _image(self, event: ImageDone) -> Json:
        codes_HW: Codes = event.codes_HW.astype("int64")
        height, width = codes_HW.shape
        return {
            "type": "image_url",
            "image_url": {"url": await self._pictures.png(codes_HW)},
            "number": event.number,
            "size": f"{height}*{width}",
        }


def engine_failed(error: EngineFailure) -> Refusal:
    """What a client is told when the engine fails."""
    return Refusal(
        f"generation failed: {error}; /health says whether the server recovered",
        status=500,
        type=SERVER,
        code="engine_failure",
    )


async def unless_gone(work: "asyncio.Task[Json]", *, gone: "asyncio.Task[None]") -> Json | None:
    """What ``work`` gives; None, and ``work`` cancelled, if the client is ``gone`` before."""
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode(errors="replace") + b"\n\n"
