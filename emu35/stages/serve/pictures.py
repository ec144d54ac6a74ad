"""Pictures in and out of calls: data URLs to codes, codes to data URLs.

Everything here runs in two small pools beside the engine: files are opened and resized by
``reading``, the image tokenizer is used by one thread at a time (``codec``), because it switches
settings that are global to the process and because two pictures at once would only share one
device.
"""

import asyncio
import base64
import binascii
import hashlib
import io
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from emu35.stages.serve.options import Limits
from emu35.stages.serve.refusal import Refusal, shown
from emu35.vision.codec import ImageCodec
from emu35.vision.resize import RejectedImage, open_image, to_image, to_pixels

Codes = NDArray[np.int64]

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
_REMEMBERED = 256
"""Pictures whose codes are kept: dialogues send theirs again with every turn."""

_READERS = 2
_PREVIEW_QUALITY = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A picture as it came: its URL, and where in the body it stood."""

    url: str
    place: str


class Pictures:
    """The image tokenizer as calls use it. ``codec`` None: a model that has none."""

    def __init__(self, codec: ImageCodec | None, *, limits: Limits) -> None:
        self._codec = codec
        self._limits = limits
        self._reading = ThreadPoolExecutor(_READERS, thread_name_prefix="pictures")
        self._coding = ThreadPoolExecutor(1, thread_name_prefix="codec")
        self._known: OrderedDict[tuple[bytes, int | None], Codes] = OrderedDict()

    def close(self) -> None:
        """Let the workers go; what has not begun is dropped."""
        for pool in (self._reading, self._coding):
            pool.shutdown(wait=False, cancel_futures=True)

    def check(self, sent: list[Sent]) -> None:
        """Refuse, before any is decoded, too many pictures, and URLs that are no picture.

        Raises:
            Refusal: naming the limit or the place.
        """
        most = self._limits.max_references
        if len(sent) > most:
            raise Refusal(
                f"{len(sent)} images in one call; this server takes at most {most}: send fewer",
                param="messages",
                code="too_many_images",
            )
        if sent and self._codec is None:
            raise Refusal(
                f"{sent[0].place}: this server has no image tokenizer, so it reads no pictures; "
                "start it with --vision DIR, or send text",
                param=sent[0].place,
                code="no_image_tokenizer",
            )
        for picture in sent:
            _check_url(picture)

    async def encode(self, sent: list[Sent], *, area: int | None) -> list[Codes]:
        """Codes [H, W] of checked pictures, resized to ``area`` pixels (None: kept where possible).

        Raises:
            Refusal: a picture that cannot be used, and why.
        """
        return list(await asyncio.gather(*(self._encode(each, area=area) for each in sent)))

    async def _encode(self, sent: Sent, *, area: int | None) -> Codes:
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self._reading, _content, sent)
        key = (hashlib.sha256(content).digest(), area)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        pixels_3HW = await loop.run_in_executor(self._reading, self._pixels, content, sent, area)
        codes_HW = await loop.run_in_executor(self._coding, self._codes, pixels_3HW)
        self._remember(key, codes_HW)
        return codes_HW

    async def png(self, codes_HW: Codes) -> str:
        """The picture of ``codes_HW`` as a data URL. Sent back in an earlier turn, it is these
        very codes again."""
        content = await asyncio.get_running_loop().run_in_executor(
            self._coding, self._file, codes_HW, "PNG"
        )
        self._remember((hashlib.sha256(content).digest(), None), codes_HW)
        return _data_url(content, "png")

    async def preview(self, codes_HW: Codes) -> str:
        """The rows of an unfinished picture as a data URL (JPEG: small and soon replaced)."""
        content = await asyncio.get_running_loop().run_in_executor(
            self._coding, self._file, codes_HW, "JPEG"
        )
        return _data_url(content, "jpeg")

    @property
    def available(self) -> bool:
        """Whether pictures can be read and shown at all."""
        return self._codec is not None

    @property
    def factor(self) -> int:
        """Pixels along each side that make one code."""
        return self._codec.factor if self._codec is not None else 1

    def _remember(self, key: tuple[bytes, int | None], codes_HW: Codes) -> None:
        self._known[key] = codes_HW
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _pixels(self, content: bytes, sent: Sent, area: int | None) -> NDArray[np.float32]:
        assert self._codec is not None
        factor, most = self._codec.factor, self._limits.max_image_pixels
        try:
            picture = open_image(content, max_pixels=most, max_side=most)
            if area is None and (picture.width % factor or picture.height % factor):
                area = picture.width * picture.height
            return to_pixels(picture, area=area, factor=factor)
        except RejectedImage as error:
            raise Refusal(
                f"{sent.place}: {error}; send a whole picture of at most {most} pixels "
                "(JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF)",
                param=sent.place,
                code="invalid_image",
            ) from error

    def _codes(self, pixels_3HW: NDArray[np.float32]) -> Codes:
        assert self._codec is not None
        return self._codec.encode(torch.from_numpy(pixels_3HW)[None])[0].cpu().numpy()

    def _file(self, codes_HW: Codes, format: str) -> bytes:
        assert self._codec is not None
        codes_1HW = torch.from_numpy(np.ascontiguousarray(codes_HW, dtype=np.int64))[None]
        stream = io.BytesIO()
        picture = to_image(self._codec.decode(codes_1HW)[0].cpu().numpy())
        picture.save(stream, format=format, quality=_PREVIEW_QUALITY)
        return stream.getvalue()


def _check_url(sent: Sent) -> None:
    if re.match(r"https?:", sent.url, re.IGNORECASE):
        raise Refusal(
            f"{sent.place}: {shown(sent.url)} lies elsewhere, and this server fetches nothing from "
            "the network; send the picture itself as data:image/png;base64,...",
            param=sent.place,
            code="remote_image",
        )
    if not _DATA_URL.match(sent.url[:80]):
        raise Refusal(
            f"{sent.place}: {shown(sent.url[:40])} is no picture; send data:image/png;base64,...",
            param=sent.place,
            code="invalid_image",
        )


def _content(sent: Sent) -> bytes:
    try:
        return base64.b64decode(sent.url[sent.url.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(
            f"{sent.place}: the picture is not base64 ({error}); encode its file's bytes",
            param=sent.place,
            code="invalid_image",
        ) from None


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
