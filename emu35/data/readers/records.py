"""What readers yield: raw records with undecoded pictures, or rejects with a reason."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class RawText:
    """Text as found; special strings in it are ordinary characters."""

    text: str


@dataclass(frozen=True, slots=True)
class RawImage:
    """An undecoded picture: its bytes, or the file that holds them."""

    data: bytes | Path


RawPart: TypeAlias = RawText | RawImage


class RecordForm(StrEnum):
    """``pair``: a picture and its caption, in an order to choose. ``sequence``: order is given."""

    pair = "pair"
    sequence = "sequence"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRecord:
    """A document before encoding.

    ``id`` names it within its input; ``offset`` is how many bytes of the input were read by the
    end of this record, for progress.
    """

    id: str
    parts: list[RawPart]
    form: RecordForm
    offset: int = 0


class Reason(StrEnum):
    """Why a record was rejected, as counted in the summary."""

    no_caption = "picture without a caption"
    no_picture = "caption without a picture"
    empty = "empty text"
    bad_encoding = "text is not UTF-8"
    bad_json = "not valid JSON"
    bad_record = "not a record of a known form"
    missing_file = "missing or unreadable file"
    too_large = "file too large"
    picture_too_long = "picture longer than the sequence length"
    not_a_pair = "not a picture with a caption, which order=both needs"
    damaged_input = "damaged input file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that was left out, and why: a :class:`Reason`, or that of a picture's decoder."""

    id: str
    reason: str
    detail: str = ""
    offset: int = 0


def is_readable(path: Path) -> bool:
    """Whether ``path`` is a file; False too for names that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def pair_record(
    *, id: str, caption: str | None, picture: bytes | Path | None, offset: int
) -> RawRecord | Reject:
    """A picture with its caption, or the reject that a missing half makes of it."""
    if picture is None:
        return Reject(id=id, reason=Reason.no_picture, offset=offset)
    if caption is None or not caption.strip():
        return Reject(id=id, reason=Reason.no_caption, offset=offset)
    parts: list[RawPart] = [RawText(caption.strip()), RawImage(picture)]
    return RawRecord(id=id, parts=parts, form=RecordForm.pair, offset=offset)


def text_record(*, id: str, data: bytes | str, offset: int) -> RawRecord | Reject:
    """A text document, or the reject for bytes that are no text."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        return Reject(id=id, reason=Reason.bad_encoding, detail=str(error), offset=offset)
    if not text.strip():
        return Reject(id=id, reason=Reason.empty, offset=offset)
    return RawRecord(id=id, parts=[RawText(text)], form=RecordForm.sequence, offset=offset)
