"""What readers yield: raw records with undecoded pictures, or rejects with a reason."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

PictureData: TypeAlias = bytes | Path
"""An undecoded picture: its bytes, or the file that holds them."""


@dataclass(frozen=True, slots=True)
class RawText:
    """Text as found; special strings in it are ordinary characters."""

    text: str


@dataclass(frozen=True, slots=True)
class RawImage:
    """An undecoded picture."""

    data: PictureData


@dataclass(frozen=True, kw_only=True, slots=True)
class RawCodes:
    """A picture that was encoded before (``emu35 data tokenize``): its grid as
    :mod:`emu35.data.codes.grid` writes it, the digest of the image tokenizer, what the codes were
    computed in and how many there are to choose from."""

    data: bytes
    tokenizer: str
    dtype: str
    codebook_size: int


@dataclass(frozen=True, slots=True)
class RawSpecial:
    """One special token, which only templates place."""

    token: str


RawPicture: TypeAlias = RawImage | RawCodes
"""A picture, whatever it comes as."""

RawPart: TypeAlias = RawText | RawPicture | RawSpecial


class RecordForm(StrEnum):
    """``pair``: a picture and its caption, in an order to choose. ``sequence``: order is given.
    ``task``: order is given, and a document is of no use unless it is whole."""

    pair = "pair"
    sequence = "sequence"
    task = "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRecord:
    """A document before encoding, or several that share their pictures.

    ``id`` names it within its input; ``offset`` is how many bytes of the input were read by the
    end of this record, for progress. A record that becomes several documents has no ``parts`` but
    ``several``: what is put behind the id -> the parts of that document. ``fields`` are what else
    the record says, where its form has named fields. Records of the same ``group`` (not empty) that
    follow each other are the clips of one document.
    """

    id: str
    parts: list[RawPart]
    form: RecordForm
    offset: int = 0
    several: Mapping[str, list[RawPart]] = field(default_factory=dict[str, list[RawPart]])
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    group: str = ""

    def documents(self) -> Iterator[tuple[str, list[RawPart]]]:
        """Id and parts of every document."""
        if not self.several:
            yield self.id, self.parts
        for suffix, parts in self.several.items():
            yield self.id + suffix, parts

    def pictures(self) -> list[RawPicture]:
        """The pictures of all documents, each once."""
        found = (part for _, parts in self.documents() for part in parts)
        return list(dict.fromkeys(part for part in found if isinstance(part, RawPicture)))


class Reason(StrEnum):
    """Why a record was rejected, as counted in the summary."""

    no_caption = "picture without a caption"
    no_picture = "caption without a picture"
    empty = "empty text"
    bad_encoding = "text is not UTF-8"
    bad_json = "not valid JSON"
    bad_record = "not a record of a known form"
    bad_task = "not a task record as its schema says"
    bad_conversation = "not a conversation as LLaVA writes them"
    bad_edit = "not an edit of pictures, instruction and target"
    bad_codes = "not codes as emu35 data tokenize writes them"
    are_codes = "codes already, no picture"
    missing_file = "missing or unreadable file"
    is_link = "link in a tar"
    not_downloaded = "picture is an address, not a file"
    too_large = "file too large"
    picture_too_long = "picture longer than the sequence length"
    task_too_long = "task document longer than the sequence length"
    not_a_pair = "not a picture with a caption, which order=both needs"
    no_clip = "not a clip with its video and start"
    duplicate = "duplicate"
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


class Captions(StrEnum):
    """Whether a picture needs a caption to be of use."""

    required = "required"
    optional = "optional"


def pair_record(
    *,
    id: str,
    caption: str | None,
    picture: PictureData | RawCodes | None,
    offset: int,
    fields: Mapping[str, Any] | None = None,
    why_none: str = "",
    captions: Captions = Captions.required,
) -> RawRecord | Reject:
    """A picture with its caption, or the reject that a missing half makes of it; ``why_none`` is
    what the record tells of a picture that is not there."""
    if picture is None:
        return Reject(id=id, reason=Reason.no_picture, detail=why_none, offset=offset)
    parts: list[RawPart] = [picture if isinstance(picture, RawCodes) else RawImage(picture)]
    if caption is not None and caption.strip():
        parts.insert(0, RawText(caption.strip()))
    elif captions is Captions.required:
        return Reject(id=id, reason=Reason.no_caption, offset=offset)
    return RawRecord(id=id, parts=parts, form=RecordForm.pair, offset=offset, fields=fields or {})


def text_record(*, id: str, data: bytes | str, offset: int) -> RawRecord | Reject:
    """A text document, or the reject for bytes that are no text."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        return Reject(id=id, reason=Reason.bad_encoding, detail=str(error), offset=offset)
    if not text.strip():
        return Reject(id=id, reason=Reason.empty, offset=offset)
    return RawRecord(id=id, parts=[RawText(text)], form=RecordForm.sequence, offset=offset)
