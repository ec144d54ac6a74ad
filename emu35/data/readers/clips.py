"""Clips of one video, gathered and put in the order of their start.

The paper (section 3.1) packs the clip-text pairs of a video one after the other in temporal order.
A record is a clip if it has a field that names its video and one that says when it starts; records
of an input that name the same video become one document, in which every clip has the form it would
have had alone. A video is one input's: its clips in another file are another document.

Gathering needs the whole input before the first document, since clips may be scattered over it.
Texts and paths are held in memory, and the bytes of pictures in a temporary file (in ``TMPDIR``),
as large as the pictures of the input.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from emu35.data.readers.records import (
    RawImage,
    RawPart,
    RawRecord,
    Reason,
    RecordForm,
    Reject,
)

STARTS = ("start", "clip_start", "begin", "start_time")
"""Fields that may say when a clip starts, where none is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFields:
    """Fields of a record: ``group`` names the video, ``order`` the start of the clip (one of
    :data:`STARTS` if empty), in seconds or as ``1:02:03.5``."""

    group: str
    order: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every field that is looked at."""
        return (self.group, *((self.order,) if self.order else STARTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """A picture in the temporary file."""

    begin: int
    size: int


@dataclass(kw_only=True, slots=True)
class _Clip:
    """A clip that waits; ``kept`` are its pictures on disk by their place among the parts."""

    start: float
    record: RawRecord
    kept: dict[int, _Kept]


def gather_clips(
    records: Iterable[RawRecord | Reject], *, fields: ClipFields
) -> Iterator[RawRecord | Reject]:
    """The clips of each video in a row, by their start and then as they came; videos in the order
    of their first clip. A record that is no clip is a reject."""
    videos: dict[str, list[_Clip]] = {}
    last = 0
    with tempfile.TemporaryFile(prefix="emu35-clips-") as file:
        for record in records:
            last = max(last, record.offset)
            if isinstance(record, Reject):
                yield record
                continue
            found = _read_clip(record, fields=fields)
            if isinstance(found, str):
                yield Reject(id=record.id, reason=Reason.no_clip, detail=found)
                continue
            video, start = found
            clip = _keep(record, start=start, file=file)
            videos.setdefault(video, []).append(clip)
        total = sum(len(clips) for clips in videos.values())
        done = 0
        for video in list(videos):
            for clip in sorted(videos.pop(video), key=lambda clip: clip.start):
                done += 1
                yield replace(
                    clip.record,
                    parts=list(_parts(clip, file=file)),
                    group=video,
                    offset=last * done // total,
                )


def _read_clip(record: RawRecord, *, fields: ClipFields) -> tuple[str, float] | str:
    """Video and start in seconds, or what is wrong."""
    if record.form is RecordForm.task:
        return "a task record is a dialogue; leave --group-by out for such files"
    video = record.fields.get(fields.group)
    if isinstance(video, bool) or not isinstance(video, str | int) or video == "":
        return f"field {fields.group!r} is {video!r}; it must name the video of the clip"
    names = fields.names[1:]
    name = next((name for name in names if record.fields.get(name) is not None), None)
    if name is None:
        return f"none of the fields {', '.join(names)} is there; it must say when the clip starts"
    start = _seconds(record.fields[name])
    if start is None:
        value = record.fields[name]
        return f"field {name!r} is {value!r}; it must be seconds, or a time such as 1:02:03.5"
    return str(video), start


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        numbers = [float(part) for part in str(value).split(":")]
    except ValueError:
        return None
    total = 0.0
    for number in numbers:
        total = 60 * total + number
    return total if len(numbers) <= 3 and math.isfinite(total) else None


def _keep(record: RawRecord, *, start: float, file: IO[bytes]) -> _Clip:
    kept: dict[int, _Kept] = {}
    parts: list[RawPart] = list(record.parts)
    for place, part in enumerate(parts):
        if isinstance(part, RawImage) and isinstance(part.data, bytes):
            kept[place] = _Kept(begin=file.tell(), size=len(part.data))
            file.write(part.data)
            parts[place] = RawImage(b"")
    # The fields of a row of parquet hold the bytes, too.
    return _Clip(start=start, record=replace(record, parts=parts, fields={}), kept=kept)


def _parts(clip: _Clip, *, file: IO[bytes]) -> Iterator[RawPart]:
    for place, part in enumerate(clip.record.parts):
        if place in clip.kept:
            file.seek(clip.kept[place].begin)
            yield RawImage(file.read(clip.kept[place].size))
        else:
            yield part
