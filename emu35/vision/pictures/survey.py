"""A look at every picture before training: sizes, scores, and who is left out.

Part by part of the listing, the cheap filters (sizes from headers, numbers from metadata) go first,
and only what they leave is decoded for the others. The ranks share the work of each part out and
tell each other, so each picture is read by one rank and all ranks know the same numbers, to the
bit; the main rank keeps them (:mod:`.columns`) and what could not be read (:mod:`.unread`), and a
run that is resumed reads them there. Memory: a few numbers for each picture, and one batch of
decoded ones.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from emu35.config.images import SIZE_SCORERS
from emu35.errors import DataError, Emu35Error
from emu35.parallel.collectives import is_main, objects_of_ranks, rank, world_size
from emu35.vision.pictures.columns import PART, ColumnFolder, Part, empty_part
from emu35.vision.pictures.files import PictureFiles, fingerprint
from emu35.vision.pictures.filters import (
    BROKEN,
    KEPT,
    Filters,
    Selection,
    refuse_missing,
    size_score,
)
from emu35.vision.pictures.readers import (
    MetadataReader,
    PixelReader,
    Reader,
    Readings,
    SizeReader,
)
from emu35.vision.pictures.store import too_many
from emu35.vision.pictures.unread import Unread

SAY_EVERY = 15.0
"""Seconds between messages of progress."""

Message = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Readers:
    """Who is asked; None where nobody wants to know."""

    sizes: SizeReader | None = None
    metadata: MetadataReader | None = None
    pixels: PixelReader | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stores:
    """What is known from before, on the main rank; None where nothing is kept."""

    columns: ColumnFolder | None = None
    unread: Unread | None = None


class Survey:
    """Goes through ``files`` once."""

    def __init__(
        self,
        files: PictureFiles,
        *,
        filters: Filters,
        readers: Readers,
        stores: Stores,
        pool: ThreadPoolExecutor,
        message: Message,
    ) -> None:
        self._files = files
        self._filters = filters
        self._readers = readers
        self._columns = stores.columns
        self._remembered = stores.unread
        self._unread = dict[str, dict[int, str]]()
        self._pool = pool
        self._message = message
        self._said = time.monotonic()
        count = len(files)
        self._found = Selection(
            files=files,
            filters=filters,
            verdict_N=np.full(count, KEPT, dtype=np.int16),
            score_N=np.full(count, np.nan),
            sizes_N2=np.zeros((count, 2), dtype=np.int64) if readers.sizes else None,
            broken={},
            damaged={},
            seen=[[] for _ in filters.all],
        )

    def run(self) -> Selection:
        """
        Raises:
            DataError: too many pictures are broken, or a score is missing that may not.
        """
        for part, first in enumerate(range(0, len(self._files), PART)):
            self._look_at(part, slice(first, min(first + PART, len(self._files))))
        return self._found

    def remember(self) -> None:
        """Keep what could not be read, for this run when it is resumed. Collective.

        Raises:
            DataError: it cannot be written.
        """
        memory = self._remembered
        on_every_rank(lambda: None if memory is None else memory.write(self._unread))

    def _look_at(self, part: int, span: slice) -> None:
        """One part: cheap filters, then pixels of what they leave."""
        readers, count = self._readers, span.stop - span.start
        everyone = np.ones(count, dtype=bool)
        scores = dict[str, NDArray[np.float64]]()
        if readers.sizes is not None:
            sizes = self._complete(readers.sizes, part=part, span=span, wanted=everyone)
            self._note_broken(sizes["width"], span=span, among=everyone)
            width, height = sizes["width"].value, sizes["height"].value
            assert self._found.sizes_N2 is not None
            self._found.sizes_N2[span] = np.nan_to_num(np.stack([width, height], axis=1))
            for name in SIZE_SCORERS:
                scores[name] = size_score(name, width=width, height=height)
        fields = dict[str, Part]()
        if readers.metadata is not None:
            fields = self._complete(readers.metadata, part=part, span=span, wanted=everyone)
            for found in fields.values():
                self._found.damaged.update(_in_listing(found.reasons, span=span))
        for bounds in self._filters.all:
            field = self._filters.field(bounds.scorer)
            if field is not None:
                scores[bounds.scorer] = fields[field].value
        for number in self._filters.cheap:
            self._judge(number, scores, span=span)
        if readers.pixels is not None:
            self._add_pixel_scores(scores, reader=readers.pixels, part=part, span=span)
        for number in self._filters.dear:
            self._judge(number, scores, span=span)
        tried = span.stop
        if too_many(bad=len(self._found.broken), tried=tried):
            index, reason = next(iter(self._found.broken.items()))
            raise DataError(
                f"{len(self._found.broken)} of {tried} pictures cannot be used (the first: "
                f"{self._files[index].name}: {reason}); look at data.paths and remove or mend them"
            )
        self._say(f"looked at {span.stop} of {len(self._files)} pictures")

    def _add_pixel_scores(
        self,
        scores: dict[str, NDArray[np.float64]],
        *,
        reader: PixelReader,
        part: int,
        span: slice,
    ) -> None:
        alive = self._found.verdict_N[span] == KEPT
        empty = np.full(len(alive), np.nan)
        wanted = {
            name: alive & np.isnan(scores.get(name, empty)) for name in self._filters.computed
        }
        for name, found in self._complete(reader, part=part, span=span, wanted=wanted).items():
            # Not those that a kept column remembers although nobody asked this time.
            self._note_broken(found, span=span, among=wanted[name])
            scores[name] = np.where(wanted[name], found.value, scores.get(name, empty))

    def _judge(
        self, number: int, scores: Mapping[str, NDArray[np.float64]], *, span: slice
    ) -> None:
        """Filter ``number`` on what is still kept of a part."""
        verdict = self._found.verdict_N[span]  # a view
        alive = np.flatnonzero(verdict == KEPT)
        shown = scores[self._filters.all[number].scorer][alive]
        refuse_missing(self._found, number, scores=shown, indices=span.start + alive)
        fails = self._filters.failing(number, shown)
        verdict[alive[fails]] = number
        self._found.score_N[span][alive[fails]] = shown[fails]
        self._found.seen[number].append(shown.astype(np.float32))

    def _note_broken(self, found: Part, *, span: slice, among: NDArray[np.bool_]) -> None:
        verdict = self._found.verdict_N[span]  # a view
        for place, reason in found.reasons.items():
            if among[place] and verdict[place] == KEPT:
                verdict[place] = BROKEN
                self._found.broken[span.start + place] = reason

    def _complete(
        self,
        reader: Reader,
        *,
        part: int,
        span: slice,
        wanted: NDArray[np.bool_] | Mapping[str, NDArray[np.bool_]],
    ) -> dict[str, Part]:
        """The columns of ``reader`` for a part, known wherever ``wanted``: by name, or for all."""
        kept = on_every_rank(
            lambda: self._kept(reader, part=part, span=span) if is_main() else None
        )[0]
        assert kept is not None
        unknown = {
            name: (wanted if isinstance(wanted, np.ndarray) else wanted[name]) & ~found.known
            for name, found in kept.items()
        }
        names = [name for name, places in unknown.items() if places.any()]
        if names:
            self._add_readings(reader, part=part, span=span, kept=kept, unknown=unknown)
        if is_main():
            for column in reader.columns:
                unread = _in_listing(kept[column.name].reasons, span=span)
                self._unread.setdefault(column.identity, {}).update(unread)
        return kept

    def _add_readings(
        self,
        reader: Reader,
        *,
        part: int,
        span: slice,
        kept: dict[str, Part],
        unknown: Mapping[str, NDArray[np.bool_]],
    ) -> None:
        """Read what is ``unknown``, on all ranks, into ``kept``."""
        names = [name for name, places in unknown.items() if places.any()]
        places = np.flatnonzero(np.any([unknown[name] for name in names], axis=0))
        shares = [places[first :: world_size()] for first in range(world_size())]
        readings = on_every_rank(
            lambda: self._read(reader, span=span, places=shares[rank()], names=names)
        )
        for share, found in zip(shares, readings, strict=True):
            for name in names:
                kept[name].value[share] = found.values[name]
                kept[name].known[share] = True
                for place, reason in found.reasons.items():
                    kept[name].reasons[int(share[place])] = reason
        on_every_rank(lambda: self._keep(reader, part=part, found=kept, names=names))

    def _keep(
        self, reader: Reader, *, part: int, found: Mapping[str, Part], names: list[str]
    ) -> None:
        if not is_main() or self._columns is None:
            return
        for column in reader.columns:
            if column.name in names:
                self._columns.write(column, found[column.name], part=part)

    def _kept(self, reader: Reader, *, part: int, span: slice) -> dict[str, Part]:
        """What is kept of a part, and what this run could not read when it began."""
        columns, memory, count = self._columns, self._remembered, span.stop - span.start
        kept = dict[str, Part]()
        for column in reader.columns:
            found = columns.read(column, part=part, count=count) if columns else empty_part(count)
            if memory is not None:
                found.reasons = memory.of(column, span=span)
                places = np.array(list(found.reasons), dtype=np.int64)
                found.known[places], found.value[places] = True, np.nan
            kept[column.name] = found
        return kept

    def _read(
        self, reader: Reader, *, span: slice, places: NDArray[np.int64], names: list[str]
    ) -> Readings:
        """Batch by batch, so that no more than one batch is decoded at a time."""
        total = Readings(values={name: np.full(len(places), np.nan) for name in names})
        files = self._files[span].choose(places)
        for first in range(0, len(places), reader.batch):
            batch = slice(first, first + reader.batch)
            found = reader.read(list(files[batch]), wanted=names, pool=self._pool)
            for name in names:
                total.values[name][batch] = found.values[name]
            total.reasons.update({first + place: why for place, why in found.reasons.items()})
            self._say(f"reading pictures {span.start} to {span.stop} of {len(self._files)}")
        return total

    def _say(self, text: str) -> None:
        if is_main() and time.monotonic() - self._said > SAY_EVERY:
            self._message(text)
            self._said = time.monotonic()


def _in_listing(reasons: Mapping[int, str], *, span: slice) -> dict[int, str]:
    """By index instead of place in ``span``."""
    return {span.start + place: why for place, why in reasons.items()}


T = TypeVar("T")


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """What ``action`` gives on every rank, in rank order; where it fails on one it fails on all,
    which would otherwise wait for that one.

    Raises:
        Emu35Error: as the action does; DataError on the other ranks.
    """
    try:
        value, failure = action(), None
    except Emu35Error as error:
        value, failure = None, error
    every = objects_of_ranks((value, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for number, (_, words) in enumerate(every):
        if words is not None:
            raise DataError(f"rank {number}: {words}")
    return [cast(T, found) for found, _ in every]


def agreed_fingerprint(files: PictureFiles) -> str:
    """:func:`fingerprint` of a listing that every rank has made for itself.

    Raises:
        DataError: the ranks found different pictures.
    """
    every = objects_of_ranks((fingerprint(files), len(files)))
    if len(set(every)) > 1:
        counts = ", ".join(str(count) for _, count in every)
        raise DataError(
            f"the ranks find different pictures under data.paths (of ranks 0, 1 ...: {counts}); "
            "give every host the same files, and let nothing write there meanwhile"
        )
    return every[0][0]
