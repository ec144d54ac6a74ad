"""From the data section to sources that are open, and to the plan of their stream."""

from dataclasses import dataclass, replace

import numpy as np

from emu35.config.data import (
    CacheConfig,
    Damaged,
    FilterConfig,
    Overlong,
    Packing,
    SourceConfig,
    TokenDataConfig,
    is_drawn,
)
from emu35.data.batch import SourceItems
from emu35.data.filter import apply_filter, describe_filter
from emu35.data.items import Items
from emu35.data.packed_items import PackedItems
from emu35.data.place import Place, Url, place_of
from emu35.data.plan import Planner
from emu35.data.planned import PlannedSource
from emu35.data.row_settings import CONFIG, RowSettings
from emu35.data.source import Source, check_vision, say_nothing
from emu35.data.storage import Message as Message
from emu35.errors import DataError
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenPlan:
    """The sources of a mixture, by name, and the planner that numbers them in this order."""

    sources: list[SourceItems]
    planner: Planner


def open_plan(
    *,
    data: TokenDataConfig,
    vocabulary: Vocabulary,
    seed: int,
    global_batch_size: int,
    message: Message = say_nothing,
    alarm: Message | None = None,
) -> OpenPlan:
    """Open every source whose ratio is ever positive and plan from the first sample on: the stream
    that all ranks of a run agree on, whatever their number.

    ``message`` hears what is left out and how full offline packing gets; for ``alarm`` see
    :class:`~emu35.data.source.Source`.

    Raises:
        DataError: as :class:`~emu35.data.loader.TokenLoader` does.
    """
    if not any(is_drawn(source) for source in data.sources.values()):
        raise DataError(
            "data.sources names no source with a positive ratio; add one, for example "
            "data.sources.text.path=FOLDER"
        )
    sources = {
        name: _open(name, config=config, data=data, vocabulary=vocabulary, say=(message, alarm))
        for name, config in sorted(data.sources.items())
        if is_drawn(config)
    }
    entries = list(sources.values())
    check_vision([entry.source for entry in entries])
    planner = Planner(
        sources=[
            _plan(entry, config=data.sources[name], data=data) for name, entry in sources.items()
        ],
        sequence_length=data.sequence_length,
        open_bins=data.open_bins,
        shuffle_window=data.shuffle_window,
        seed=seed,
        overlong=data.overlong,
        between=data.schedule,
        samples_per_step=global_batch_size,
    )
    for number, rows in planner.packed.items():
        entry = entries[number]
        packed = "packed offline into" if entry.items.rows is None else "that lie packed in"
        message(
            f"source {entry.source.name!r}: {len(entry.items)} pieces {packed} "
            f"{len(rows)} rows of {data.sequence_length} tokens, {rows.fill:.2%} full"
        )
    return OpenPlan(sources=entries, planner=planner)


def _open(
    name: str,
    *,
    config: SourceConfig,
    data: TokenDataConfig,
    vocabulary: Vocabulary,
    say: tuple[Message, Message | None],
) -> SourceItems:
    message, alarm = say
    entry = open_source(
        name=name,
        path=place_of(config.path),
        vocabulary=vocabulary,
        limit=data.sequence_length,
        bounds=config.filter,
        overlong=data.overlong,
        damaged=data.damaged,
        cache=data.cache,
        message=message,
        alarm=alarm,
    )
    if entry.items.rows is None:
        packing = config.packing or data.packing
        _warn_of_thrashing(entry.source, packing=packing, data=data, message=message)
    elif config.packing is Packing.online:
        raise DataError(
            f"data.sources.{name}.packing=online, but {config.path} lies packed, and its rows are "
            "read as they are; leave packing out, or name the folders that it was packed from"
        )
    return entry


def open_source(
    *,
    name: str,
    path: Place,
    vocabulary: Vocabulary,
    limit: int,
    max_documents: int | None = None,
    bounds: FilterConfig | None = None,
    overlong: Overlong = Overlong.cut,
    damaged: Damaged = Damaged.refuse,
    cache: CacheConfig | None = None,
    message: Message = say_nothing,
    alarm: Message | None = None,
    settings: RowSettings = CONFIG,
) -> SourceItems:
    """Open a folder of shards and fit its documents to rows of ``limit`` tokens.

    ``bounds`` are those that its documents are to keep. ``message`` hears what they, ``overlong``
    and ``damaged`` leave out; for ``alarm`` see :class:`~emu35.data.source.Source`. All call
    things as ``settings`` do.

    Raises:
        DataError: if the folder cannot be used, is empty, nothing of it is left, or it lies packed
            and its rows have another length or are to be filtered.
    """
    source = Source(
        name=name,
        path=path,
        vocabulary=vocabulary,
        damaged=damaged,
        cache=cache,
        message=message,
        alarm=alarm,
    )
    if source.packed is not None:
        if describe_filter(bounds) != describe_filter(None):
            raise DataError(
                f"data.sources.{name}.filter chooses among documents, but {path} lies packed in "
                "rows; filter the folders that it was packed from, or leave the filter out"
            )
        items = PackedItems(source=source, limit=limit, max_pieces=max_documents, overlong=overlong)
        return _checked(items, source=source, limit=limit, message=message, settings=settings)
    keep = None
    if max_documents is not None:
        keep = np.arange(len(source)) < max_documents
    if bounds is not None:
        filtered = apply_filter(source, bounds=bounds)
        if filtered.left_out is not None:
            if not filtered.keep.any():
                raise DataError(f"{filtered.left_out}. That leaves nothing; widen its filter")
            message(filtered.left_out)
        keep = filtered.keep if keep is None else keep & filtered.keep
    items = Items(source=source, limit=limit, documents=keep, overlong=overlong, settings=settings)
    return _checked(items, source=source, limit=limit, message=message, settings=settings)


def _checked(
    items: Items, *, source: Source, limit: int, message: Message, settings: RowSettings
) -> SourceItems:
    """Tell what was dropped. Raises: DataError if nothing is left."""
    drop = settings.overlong_is(Overlong.drop)
    if items.dropped is not None:
        too_long = items.dropped.describe(source=source, limit=limit)
        if len(items) == 0:
            raise DataError(
                f"{too_long}. {drop} leaves nothing of this source; raise {settings.length}, or "
                "ingest pictures with a smaller area"
            )
        message(f"{too_long}. They are left out ({drop})")
    if len(items) == 0:
        raise DataError(f"shard folder {source.path} holds no document; ingest some into it")
    return SourceItems(source=source, items=items)


def _warn_of_thrashing(
    source: Source, *, packing: Packing, data: TokenDataConfig, message: Message
) -> None:
    size = sum(shard.tar_bytes for shard in source.shards)
    if isinstance(source.path, Url) and packing is Packing.offline and size > data.cache.bytes:
        message(
            f"source {source.name!r} ({source.path}) is packed offline, so that every row has "
            f"documents from all over it, and its {size} bytes do not fit "
            f"data.cache.bytes={data.cache.bytes}: shards will come again and again. Raise the "
            "bound, or pack it online"
        )


def plan_source(
    entry: SourceItems, *, ratio: float, packing: Packing = Packing.online
) -> PlannedSource:
    """What the planner needs to know of a source."""
    rows, document = entry.items.rows, entry.items.document
    if isinstance(entry.items, PackedItems):
        # Where the next document begins; the rest of one that was cut may lie anywhere.
        document = np.cumsum(entry.items.is_beginning) - 1
    return PlannedSource(
        name=entry.source.name,
        ratio=ratio,
        length=entry.items.length,
        per_shard=entry.items.per_shard,
        fingerprint=entry.source.fingerprint,
        left_out=tuple(shard.name for shard in entry.source.damaged),
        packing=packing if rows is None else Packing.offline,
        document=document,
        rows=rows,
    )


def _plan(entry: SourceItems, *, config: SourceConfig, data: TokenDataConfig) -> PlannedSource:
    """With all that the configuration says of it."""
    return replace(
        plan_source(entry, ratio=config.ratio, packing=config.packing or data.packing),
        schedule=dict(config.schedule),
        epochs=config.epochs,
        max_tokens=config.max_tokens,
        filter=describe_filter(config.filter),
    )
