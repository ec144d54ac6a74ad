"""Which source comes next: the one whose share of tokens lags furthest behind its ratio."""

from collections.abc import Sequence


class Mixture:
    """Draws sources so that their token counts follow ``ratios``.

    The deficit of a source is ratio * (all tokens drawn) - (its tokens drawn). Counts are exact
    integers, so that nothing drifts over a long run and a restored mixture goes on identically.
    """

    def __init__(self, *, ratios: Sequence[float], drawn: Sequence[int] | None = None) -> None:
        total = sum(ratios)
        assert total > 0
        self.ratios = [ratio / total for ratio in ratios]
        self.drawn = list(drawn) if drawn is not None else [0] * len(self.ratios)
        self._total = sum(self.drawn)

    def next_source(self) -> int:
        """The source with the largest deficit; the first of equals."""
        if len(self.ratios) == 1:
            return 0
        total = self._total
        deficits = [
            ratio * total - drawn for ratio, drawn in zip(self.ratios, self.drawn, strict=True)
        ]
        return deficits.index(max(deficits))

    def add(self, source: int, *, tokens: int) -> None:
        """Count tokens drawn from ``source``."""
        self.drawn[source] += tokens
        self._total += tokens
