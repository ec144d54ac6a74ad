"""Which source comes next: the one whose share of tokens lags furthest behind its ratio."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu35.data.pack import LENGTH_MASK

_LOWEST = float("-inf")


class Mixture:
    """Keeps the tokens drawn from every source close to their targets.

    All tokens drawn since the ratios last changed, times the ratio of a source, is what is due to
    it since then; its target is that on top of its target at the change, to the whole token. Its
    deficit is the target less what was drawn from it. Counts and targets at a change are exact
    integers, so that nothing drifts over a long run and a restored mixture goes on identically.

    Sources whose ratio is 0 are not drawn, whatever their deficit.

    Attributes:
        ratios: as they are now, summing to 1; 0 for a source that is not drawn.
        drawn: tokens drawn from each source.
        dry: the source that ended the last :meth:`draw`.
    """

    def __init__(self, *, ratios: Sequence[float]) -> None:
        self.drawn = [0] * len(ratios)
        self._base = [0] * len(ratios)
        self._base_total = 0
        self.ratios = _shares(ratios)
        self.dry: int | None = None

    def draw(self, streams: Sequence[Iterator[int]]) -> Iterator[int]:
        """Codes (:mod:`~emu35.data.pack`) from ``streams``, one a source: always the next of the
        source with the largest deficit, the first of equals. Ends when that one is ``dry``.

        These are the inner loops of planning, hence the plain lists of the sources that are drawn.
        """
        self.dry = None
        numbers = [number for number, ratio in enumerate(self.ratios) if ratio > 0]
        assert numbers
        if len(numbers) == 1:
            return self._draw_one(streams[numbers[0]], number=numbers[0])
        return self._draw_many(streams, numbers=numbers)

    def _draw_one(self, stream: Iterator[int], *, number: int) -> Iterator[int]:
        drawn = self.drawn
        for code in stream:
            drawn[number] += code & LENGTH_MASK
            yield code
        self.dry = number

    def _draw_many(
        self, streams: Sequence[Iterator[int]], *, numbers: Sequence[int]
    ) -> Iterator[int]:
        drawn = self.drawn
        ratios = [self.ratios[number] for number in numbers]
        # Whole numbers, so that a float holds them exactly.
        ahead = [float(drawn[number] - self._base[number]) for number in numbers]
        since = float(sum(drawn) - self._base_total)
        while True:
            largest, best, place = _LOWEST, 0, 0
            for ratio, tokens in zip(ratios, ahead):  # noqa: B905 (strict costs a tenth)
                deficit = ratio * since - tokens
                if deficit > largest:
                    largest, best = deficit, place
                place += 1  # noqa: SIM113 (so does enumerate)
            number = numbers[best]
            code = next(streams[number], 0)
            if not code:
                self.dry = number
                return
            length = code & LENGTH_MASK
            since += length
            ahead[best] += length
            drawn[number] += length
            yield code

    @property
    def live(self) -> bool:
        """Whether any source is drawn."""
        return any(ratio > 0 for ratio in self.ratios)

    def change(self, ratios: Sequence[float]) -> None:
        """Follow other ratios from here on; what is due stays due. None changes nothing."""
        shares = _shares(ratios)
        if shares == self.ratios:
            return
        since = sum(self.drawn) - self._base_total
        self._base = [
            base + round(ratio * since) for base, ratio in zip(self._base, self.ratios, strict=True)
        ]
        self._base_total += since
        self.ratios = shares

    def state_dict(self) -> dict[str, Any]:
        """Everything but the ratios, as JSON-able values."""
        return {"drawn": list(self.drawn), "base": list(self._base), "total": self._base_total}

    def load_state_dict(self, state: Mapping[str, Any], *, ratios: Sequence[float]) -> None:
        """Go on from :meth:`state_dict` under the ratios of that moment."""
        self.drawn = [int(count) for count in state["drawn"]]
        self._base = [int(target) for target in state["base"]]
        self._base_total = int(state["total"])
        self.ratios = _shares(ratios)


def _shares(ratios: Sequence[float]) -> list[float]:
    total = sum(ratios)
    return [ratio / total for ratio in ratios] if total > 0 else [0.0] * len(ratios)
