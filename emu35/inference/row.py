"""The row of tokens of one forward, in memory that is taken once.

Every token that is fed takes a slot of the cache, so a row is never longer than the cache.
"""

from collections.abc import Sequence

import torch

from emu35.inference.scheduler import Feed
from emu35.model.cache import CachedForward, KVCache, Span
from emu35.model.context import AttentionContext


class TokenRow:
    """``slots`` are those of the ``cache``. Adapters of noisy copies, where the model has any, are
    told the rows of canvases."""

    def __init__(self, cache: KVCache, *, slots: int) -> None:
        device = cache.keys_NGLD.device
        self._cache = cache
        self._tokens_1S = torch.zeros(1, slots, dtype=torch.int64, device=device)
        self._positions_1S = torch.zeros_like(self._tokens_1S)
        self._adapted_1S = torch.zeros_like(self._tokens_1S, dtype=torch.bool)

    def fill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, AttentionContext]:
        """Token ids int64 [1, S] and the context of a forward of ``feeds``, in their order, in
        which canvases come last. Valid until the next call."""
        tokens: list[int] = []
        positions: list[int] = []
        plain = [feed for feed in feeds if feed.canvas is None]
        for feed in plain:
            begin = feed.stream.fed
            tokens += feed.stream.tokens[begin : begin + feed.count]
            positions += range(begin, begin + feed.count)
        end = len(tokens)
        if plain:  # in one copy to the device
            both = torch.tensor([tokens, positions])
            self._tokens_1S[0, :end] = both[0]
            self._positions_1S[0, :end] = both[1]
        first = end
        for feed in feeds[len(plain) :]:
            assert feed.canvas is not None, "canvases come last"
            place = slice(end, end + feed.count)
            img = len(feed.stream.tokens) - 1
            self._tokens_1S[0, place] = feed.canvas.tokens()
            torch.arange(img, img + feed.count, out=self._positions_1S[0, place])
            end += feed.count
        canvases = end > first
        if canvases:
            self._adapted_1S[0, :first] = False
            self._adapted_1S[0, first:end] = True
        context = AttentionContext(
            positions_BS=self._positions_1S[:, :end],
            cache=CachedForward(self._cache, spans=[_span(feed) for feed in feeds]),
            adapted_BS=self._adapted_1S[:, :end] if canvases else None,
        )
        return self._tokens_1S[:, :end], context


def _span(feed: Feed) -> Span:
    stream = feed.stream
    assert stream.extent is not None
    if feed.canvas is None:
        return Span(start=stream.extent.start, length=stream.fed, count=feed.count)
    # The tokens before IMG may be fed by the very same forward: their keys are written before
    # anything attends.
    return Span(
        start=stream.extent.start,
        length=len(stream.tokens) - 1,
        count=feed.count,
        causal=False,
    )
