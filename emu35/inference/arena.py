"""Who owns which slots of the cache: contiguous extents that grow where they can.

A sequence's keys lie side by side, so attention reads them in place, without a table of pages and
without padding. An extent that has to grow takes the free slots behind it, or moves to a larger
gap; when only the sum of the gaps is large enough, all extents slide together. Each of these costs
one copy of a sequence, and sizes at least double, so copying stays a small share of the work.
"""

from collections.abc import Callable
from dataclasses import dataclass

PAGE = 64
"""Extents begin and end at multiples of this."""


@dataclass(kw_only=True, slots=True, eq=False)
class Extent:
    """Slots [start, start + size) of one stream; ``used`` of them hold keys."""

    start: int
    size: int
    used: int = 0


Move = Callable[[int, int, int], object]
"""Copies (source, target, count) slots."""


def whole_pages(count: int) -> int:
    """``count`` rounded up to pages."""
    return -(-count // PAGE) * PAGE


class Arena:
    """``slots`` slots, handed out first fit. ``move`` copies slots of the cache."""

    def __init__(self, slots: int, *, move: Move) -> None:
        self.slots = slots // PAGE * PAGE
        self._move = move
        self._extents: list[Extent] = []  # ascending, apart

    @property
    def free(self) -> int:
        """Slots that nobody owns."""
        return self.slots - sum(extent.size for extent in self._extents)

    def allocate(self, count: int) -> Extent | None:
        """An extent of at least ``count`` slots; None if not so many are free."""
        size = whole_pages(max(count, 1))
        if size > self.free:
            return None
        place = self._gap(size)
        if place is None:
            self._slide()
            place = self._gap(size)
            assert place is not None
        extent = Extent(start=place[1], size=size)
        self._extents.insert(place[0], extent)
        return extent

    def grow(self, extent: Extent, count: int, *, most: int) -> bool:
        """Make room for ``count`` slots in all, of ``most`` that will ever be needed; False, with
        nothing changed, if there is none."""
        if count <= extent.size:
            return True
        needed = whole_pages(count)
        if needed - extent.size > self.free:
            return False
        # Twice the size if that can be had: the next growth is then far away.
        wish = max(needed, min(2 * extent.size, whole_pages(most)))
        for size in dict.fromkeys((wish, needed)):
            if self._extend(extent, size) or self._relocate(extent, size):
                return True
        self._slide(last=extent)
        return self._extend(extent, needed)

    def release(self, extent: Extent) -> None:
        """Give the slots of ``extent`` back."""
        self._extents.remove(extent)

    def _gap(self, size: int) -> tuple[int, int] | None:
        """Index and first slot for an extent of ``size`` slots, in the first gap that holds it."""
        begin = 0
        for at, extent in enumerate(self._extents):
            if extent.start - begin >= size:
                return at, begin
            begin = extent.start + extent.size
        return (len(self._extents), begin) if self.slots - begin >= size else None

    def _extend(self, extent: Extent, size: int) -> bool:
        at = self._extents.index(extent) + 1
        end = self._extents[at].start if at < len(self._extents) else self.slots
        if end - extent.start < size:
            return False
        extent.size = size
        return True

    def _relocate(self, extent: Extent, size: int) -> bool:
        place = self._gap(size)
        if place is None:
            return False
        self._move(extent.start, place[1], extent.used)
        self._extents.remove(extent)
        extent.start, extent.size = place[1], size
        self._extents.append(extent)
        self._extents.sort(key=lambda each: each.start)
        return True

    def _slide(self, *, last: Extent | None = None) -> None:
        """Close all gaps. ``last`` is left with the free slots behind it: everything after it
        slides to the far end of the arena."""
        at = len(self._extents) if last is None else self._extents.index(last) + 1
        begin = 0
        for extent in self._extents[:at]:
            self._place(extent, begin)
            begin += extent.size
        end = self.slots
        for extent in reversed(self._extents[at:]):
            end -= extent.size
            self._place(extent, end)

    def _place(self, extent: Extent, start: int) -> None:
        if extent.start != start:
            self._move(extent.start, start, extent.used)
            extent.start = start
