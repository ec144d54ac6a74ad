"""An answer as it comes: events of :mod:`emu35.inference.progress`, with stop strings cut off.

The engine ends behind the token that completes a stop string, and the string is no part of the
answer. While text streams, its end may be the beginning of a stop string, so that much is held back
until it is known.
"""

from collections.abc import Sequence
from dataclasses import replace

from emu35.inference.progress import End, Event, Progress, TextPiece, ThoughtPiece
from emu35.inference.request import Generated, Token, Update
from emu35.tokens.text import TextTokenizer


class Pieces:
    """The events of one request. Feed it every update in order."""

    def __init__(self, tokenizer: TextTokenizer, *, stop: Sequence[str]) -> None:
        self._progress = Progress(tokenizer)
        self._stop = stop
        self._held: TextPiece | ThoughtPiece | None = None
        self._stopped = False
        self.tokens: list[Token] = []
        self.finished: Generated | None = None

    def feed(self, update: Update) -> list[Event]:
        """What ``update`` adds; with the last one everything is out."""
        self.tokens += update.tokens
        events = self._progress.feed(update.tokens)
        if update.finished is not None:
            self.finished = update.finished
            events += self._progress.finish()
        return self._cut(events) if self._stop else [e for e in events if not isinstance(e, End)]

    def _cut(self, events: Sequence[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            if not isinstance(event, TextPiece | ThoughtPiece):
                # A stop string lies within one stretch of text; this one is over.
                kept += self._release()
                if not isinstance(event, End):
                    kept.append(event)
                continue
            if self._held is not None and type(self._held) is not type(event):
                kept += self._release()
            if shown := self._pass(event):
                kept.append(replace(event, text=shown))
        return kept

    def _release(self) -> list[Event]:
        """What was held back, now that it can be no stop string any more."""
        held, self._held = self._held, None
        return [] if held is None else [held]

    def _pass(self, piece: TextPiece | ThoughtPiece) -> str:
        """What may be shown of ``piece`` and what is held back from before."""
        if self._stopped:
            return ""
        text = (self._held.text if self._held else "") + piece.text
        self._held = None
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self._stopped = True
            return text[: min(places)]
        held = max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        if held:
            self._held = replace(piece, text=text[-held:])
        return text[: len(text) - held]
