"""Turning the pictures of raw records into codes: opened in threads, encoded in batches.

``data`` does not know the image tokenizer; a :class:`PictureEncoder` is handed in by the stage
that assembles an ingestion.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL.Image import Image as Picture

from emu35.data.codes.grid import decode_grid
from emu35.data.readers.records import (
    RawCodes,
    RawPart,
    RawPicture,
    RawRecord,
    RawText,
    Reason,
    Reject,
)
from emu35.errors import DataError
from emu35.tokens.document import Image, Part, Special, Text

# Bounds of what is held at a time: decoded pictures take 3 bytes a pixel.
_WINDOW_PIXELS = 64 * 2**20
_WINDOW_RECORDS = 1024
# Records handed to the threads together. Not by the number of threads, on which the windows, and
# so the batches that pictures are encoded in, must not depend.
_CHUNK = 8


class UnusablePicture(DataError):
    """A picture that cannot be encoded: ``reason`` in a few stable words, and ``detail``."""

    def __init__(self, *, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class PictureEncoder(Protocol):
    """Opens, resizes and encodes pictures.

    Attributes:
        digest: identifies the weights that make the codes.
        dtype: what they are computed in, such as ``float32``.
        factor: pixels per code along each side.

    With several workers each has a copy, made by pickling.
    """

    @property
    def digest(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def factor(self) -> int: ...

    def join(self, *, worker: int, workers: int) -> None:
        """Take this process's share of the machine: it is one of several, counted from 0."""
        ...

    def check(self) -> None:
        """Load what encoding needs, so that a wrong option shows before anything is replaced.

        Raises:
            Emu35Error: if pictures could not be encoded as asked.
        """
        ...

    def prepare(self, data: bytes | Path) -> Picture:
        """Open and resize; both sides become multiples of the factor. Called from threads.

        ``info["source_size"]`` of the picture tells its width and height before.

        Raises:
            UnusablePicture: for anything that is not a picture, is damaged or absurdly large.
        """
        ...

    def encode(self, pictures: Sequence[Picture]) -> list[npt.NDArray[np.integer[Any]]]:
        """Codes [H, W] of pictures that all have the same size."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRecord:
    """A record whose pictures are codes, each picture encoded once; ``hashes`` of their bytes where
    they were asked for; ``sizes`` (width, height) of those that were encoded here, as opened."""

    record: RawRecord
    codes: Mapping[RawPicture, Image]
    hashes: Mapping[RawPicture, bytes]
    sizes: Mapping[RawPicture, tuple[int, int]] = field(
        default_factory=dict[RawPicture, tuple[int, int]]
    )

    def hashes_of(self, parts: Iterable[RawPart]) -> bytes:
        """The hashes of the pictures among ``parts``, one after the other."""
        return b"".join(self.hashes.get(p, b"") for p in parts if isinstance(p, RawPicture))

    def documents(self) -> Iterator[tuple[str, list[Part], bytes]]:
        """Id, parts and the pictures' hashes of every document of the record."""
        for id, parts in self.record.documents():
            yield id, [self._part(part) for part in parts], self.hashes_of(parts)

    def _part(self, part: RawPart) -> Part:
        if isinstance(part, RawPicture):
            return self.codes[part]
        return Text(part.text) if isinstance(part, RawText) else Special(part.token)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A record with its pictures opened and resized, but for those that are codes already."""

    record: RawRecord
    pictures: list[Picture]
    codes: dict[RawPicture, Image]
    hashes: dict[RawPicture, bytes]


@dataclass(kw_only=True, slots=True)
class PictureStage:
    """Encodes a stream of records, keeping its order.

    Pictures of equal size go through the codec together, whichever records of a window of about
    64 million pixels they belong to.

    A picture that cannot fit a document of ``sequence_length`` tokens (0: no limit) is rejected
    before it is encoded. With ``hashing`` the bytes of pictures are hashed. Without ``encoder`` a
    record with a picture raises DataError: the options of the whole ingestion are wrong, not the
    record. So does one with codes of another tokenizer, or of other than ``codebook_size`` codes.
    """

    encoder: PictureEncoder | None
    images_per_call: int
    threads: int
    sequence_length: int
    codebook_size: int
    hashing: bool = False

    def run(self, records: Iterable[RawRecord | Reject]) -> Iterator[EncodedRecord | Reject]:
        """Encode records window by window; rejects pass through in place."""
        stream = iter(records)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="emu35-pictures") as pool:
            while window := self._window(stream, pool=pool):
                yield from self._encode(window)

    def _window(
        self, stream: Iterator[RawRecord | Reject], *, pool: ThreadPoolExecutor
    ) -> list[_Prepared | Reject]:
        window: list[_Prepared | Reject] = []
        pixels = 0
        while pixels < _WINDOW_PIXELS and len(window) < _WINDOW_RECORDS:
            chunk = list(islice(stream, _CHUNK))
            if not chunk:
                break
            for prepared in pool.map(self._prepare, chunk):
                window.append(prepared)
                if not isinstance(prepared, Reject):
                    pixels += sum(picture.width * picture.height for picture in prepared.pictures)
        return window

    def _prepare(self, record: RawRecord | Reject) -> _Prepared | Reject:
        if isinstance(record, Reject):
            return record
        prepared = _Prepared(record=record, pictures=[], codes={}, hashes={})
        for part in record.pictures():
            if self.encoder is None:
                raise DataError(
                    f"record {record.id!r} holds a picture, but no image tokenizer was given; "
                    "name its folder with --vision (tokenizer.vision)"
                )
            try:
                if self.hashing:
                    prepared.hashes[part] = _hash(part)
                if isinstance(part, RawCodes):
                    self._check_origin(part, encoder=self.encoder, id=record.id)
                    codes = _decode(part)
                    prepared.codes[part] = codes
                    rows, columns = codes.codes_HW.shape
                else:
                    picture = self.encoder.prepare(part.data)
                    prepared.pictures.append(picture)
                    rows = picture.height // self.encoder.factor
                    columns = picture.width // self.encoder.factor
            except UnusablePicture as error:
                return _reject(record, error.reason, error.detail)
            length = picture_tokens(rows=rows, columns=columns)
            # A document is at least BOS, the picture, EOS.
            if self.sequence_length and length + 2 > self.sequence_length:
                detail = (
                    f"{rows}x{columns} codes take {length} tokens and two more for the document, "
                    f"above {self.sequence_length}; lower the area"
                )
                return _reject(record, Reason.picture_too_long, detail)
        return prepared

    def _check_origin(self, part: RawCodes, *, encoder: PictureEncoder, id: str) -> None:
        """Raises: DataError if the codes are not what ``encoder`` would have made."""
        here = (encoder.digest, encoder.dtype, self.codebook_size)
        there = (part.tokenizer, part.dtype, part.codebook_size)
        if here != there:
            raise DataError(
                f"record {id!r} holds codes of an image tokenizer with weights "
                f"{part.tokenizer[:12]}, computed in {part.dtype}, one of {part.codebook_size}; "
                f"that of --vision has weights {encoder.digest[:12]}, computes in {encoder.dtype} "
                f"and --codebook-size is {self.codebook_size}. Give the tokenizer that made the "
                "codes, or encode the pictures again with this one"
            )

    def _encode(self, window: Sequence[_Prepared | Reject]) -> Iterator[EncodedRecord | Reject]:
        pictures = [
            picture
            for prepared in window
            if not isinstance(prepared, Reject)
            for picture in prepared.pictures
        ]
        # Encoded when the first record needs them, so that records come out as the work goes on.
        batches = self._batches(pictures)
        codes: dict[int, npt.NDArray[np.integer[Any]]] = {}
        number = 0
        for prepared in window:
            if isinstance(prepared, Reject):
                yield prepared
                continue
            encoded = dict(prepared.codes)
            sizes: dict[RawPicture, tuple[int, int]] = {}
            for image in prepared.record.pictures():
                if image in encoded:
                    continue
                if number not in codes:
                    assert self.encoder is not None
                    batch = batches[number]
                    found = self.encoder.encode([pictures[other] for other in batch])
                    codes.update(zip(batch, found, strict=True))
                encoded[image] = Image(codes.pop(number))
                sizes[image] = pictures[number].info.get("source_size", pictures[number].size)
                number += 1
            yield EncodedRecord(
                record=prepared.record, codes=encoded, hashes=prepared.hashes, sizes=sizes
            )

    def _batches(self, pictures: Sequence[Picture]) -> dict[int, list[int]]:
        """Number of each picture -> those that go through the codec with it, all of one size."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, picture in enumerate(pictures):
            groups.setdefault(picture.size, []).append(number)
        return {
            number: batch
            for numbers in groups.values()
            for first in range(0, len(numbers), self.images_per_call)
            for batch in [numbers[first : first + self.images_per_call]]
            for number in batch
        }


def picture_tokens(*, rows: int, columns: int) -> int:
    """Tokens from BOI to EOI: codes, EOL between rows, BOI, IMG, EOI and the size in digits.

    Both kinds of text tokenizer write one token per digit.
    """
    return rows * columns + rows - 1 + 3 + len(f"{rows}*{columns}")


def _decode(part: RawCodes) -> Image:
    """Raises: UnusablePicture if the bytes are no grid of codes of its codebook."""
    try:
        codes_HW = decode_grid(part.data)
    except ValueError as error:
        raise UnusablePicture(reason=Reason.bad_codes, detail=str(error)) from error
    highest = int(codes_HW.max())
    if highest >= part.codebook_size:
        detail = f"code {highest} of a codebook of {part.codebook_size}"
        raise UnusablePicture(reason=Reason.bad_codes, detail=detail)
    return Image(codes_HW)


def _hash(image: RawPicture) -> bytes:
    """Raises: UnusablePicture if the file cannot be read."""
    try:
        data = image.data if isinstance(image.data, bytes) else image.data.read_bytes()
    except OSError as error:
        detail = error.strerror or str(error)
        raise UnusablePicture(reason=Reason.missing_file, detail=detail) from error
    return hashlib.sha256(data).digest()


def _reject(record: RawRecord, reason: str, detail: str) -> Reject:
    return Reject(id=record.id, reason=reason, detail=detail, offset=record.offset)
