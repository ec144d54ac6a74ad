"""Which source comes next: the one that has been served least for its ratio.

The rule takes one document at a time. Since it depends on token counts alone, a whole stretch of
the stream is worked out at once: every document of every source gets the tokens drawn from its
source before it, divided by the ratio, and the documents of all sources are sorted by that.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import length_hint
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.pack import LENGTH_MASK

Ints = npt.NDArray[np.int64]


class Stretch:
    """Codes (:mod:`~emu35.data.pack`) of all sources in the order in which they are drawn.

    Attributes:
        codes: an iterator over them, to be drawn from.
        dry: the source whose turn it is after them, and that had no more to give.
    """

    def __init__(self, codes: Ints, *, sources: Ints, dry: int, count: int) -> None:
        """``sources`` [N] are those of ``codes``, of ``count`` that there are."""
        self.dry = dry
        self._all, self._sources, self._count = codes, sources, count
        self._settled = 0
        self.codes: Iterator[int] = iter(codes.tolist())

    @property
    def done(self) -> bool:
        """Whether nothing is left of it."""
        return length_hint(self.codes) == 0

    def settle(self) -> tuple[list[int], list[int]]:
        """Codes and tokens that were drawn from each source since the last call."""
        begin, end = self._settled, len(self._all) - length_hint(self.codes)
        self._settled = end
        sources, lengths = self._sources[begin:end], self._all[begin:end] & LENGTH_MASK
        codes = np.bincount(sources, minlength=self._count)
        # Sums of floats are exact here: a stretch has far fewer than 2^53 tokens.
        tokens = np.bincount(sources, weights=lengths, minlength=self._count)
        return codes.tolist(), [int(total) for total in tokens]


class Mixture:
    """Keeps the tokens drawn from every source close to their targets.

    All tokens drawn since the ratios last changed, times the ratio of a source, is what is due to
    it since then; its target is that on top of its target at the change, to the whole token. Next
    comes the source for which the tokens drawn beyond the target at the change, divided by the
    ratio, are the fewest, the first of equals; no source then strays from its target by more than
    about one document. Counts and targets at a change are exact integers, so that nothing drifts
    over a long run and a restored mixture goes on identically.

    Sources whose ratio is 0 are not drawn, however far behind they are.

    Attributes:
        ratios: as they are now, summing to 1; 0 for a source that is not drawn.
        drawn: tokens drawn from each source.
    """

    def __init__(self, *, ratios: Sequence[float]) -> None:
        self.drawn = [0] * len(ratios)
        self._base = [0] * len(ratios)
        self._base_total = 0
        self.ratios = _shares(ratios)

    def merge(self, codes: Sequence[Ints]) -> Stretch:
        """What is drawn next of ``codes``, one array a source of what it has at hand, until it is
        the turn of a source that has no more."""
        live = [number for number, ratio in enumerate(self.ratios) if ratio > 0]
        assert live
        served: dict[int, npt.NDArray[np.float64]] = {}
        for number in live:
            lengths = codes[number] & LENGTH_MASK
            before: Ints = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            ahead = self.drawn[number] - self._base[number]
            served[number] = (ahead + before) / self.ratios[number]
        dry = min(live, key=lambda number: (served[number][-1], number))
        end = float(served[dry][-1])
        counts = [
            len(codes[dry])
            if number == dry
            else _before(served[number], end=end, ties=number < dry)
            for number in live
        ]
        parts = list(zip(live, counts, strict=True))
        # Stable, and the sources lie in their order: the first of equals.
        order = np.argsort(np.concatenate([served[n][:count] for n, count in parts]), kind="stable")
        return Stretch(
            np.concatenate([codes[number][:count] for number, count in parts])[order],
            sources=np.repeat(live, counts)[order],
            dry=dry,
            count=len(self.ratios),
        )

    def add(self, tokens: Sequence[int]) -> None:
        """Count tokens drawn from each source."""
        self.drawn = [before + more for before, more in zip(self.drawn, tokens, strict=True)]

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


def _before(served: npt.NDArray[np.float64], *, end: float, ties: bool) -> int:
    """How many documents come before ``end``, with ``ties`` those at it too."""
    return int(np.searchsorted(served[:-1], end, side="right" if ties else "left"))


def _shares(ratios: Sequence[float]) -> list[float]:
    total = sum(ratios)
    return [ratio / total for ratio in ratios] if total > 0 else [0.0] * len(ratios)
