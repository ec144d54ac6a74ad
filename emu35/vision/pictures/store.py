"""Pictures by index: decoded, resized, kept in memory while there is room, or named as broken."""

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.errors import DataError
from emu35.vision.pictures.files import PictureFile, Rejects
from emu35.vision.resize import RejectedImage, open_image

CACHE_BYTES = 2 << 30
"""Memory for resized pictures: 70,000 of 96 px or 10,000 of 256 px."""

TOLERATED_REJECTS = 10
TOLERATED_SHARE = 0.1
"""Training stops when more pictures than both of these (of those tried) were rejected."""

Resize = Callable[[Image.Image, int], NDArray[np.uint8]]
"""An upright RGB picture and its index -> uint8 [3, H, W]."""


def too_many(*, bad: int, tried: int) -> bool:
    """Whether so many broken pictures are no accident."""
    return bad > TOLERATED_REJECTS and bad > TOLERATED_SHARE * tried


class PictureStore:
    """Threads share it."""

    def __init__(
        self,
        files: Sequence[PictureFile],
        *,
        resize: Resize,
        rejects: Rejects,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._files = files
        self._resize = resize
        self._rejects = rejects
        self._lock = threading.Lock()
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes
        self._bad: set[int] = set()
        self._tried: set[int] = set()

    def get(self, index: int, *, resize: Resize | None = None) -> NDArray[np.uint8] | None:
        """uint8 [3, H, W]; None once rejected. What another ``resize`` than the store's gives is
        not kept in memory.

        Raises:
            DataError: too many pictures were rejected.
        """
        with self._lock:
            if resize is None and index in self._cache:
                return self._cache[index]
            if index in self._bad:
                return None
            self._tried.add(index)
        try:
            picture = (resize or self._resize)(open_image(self._files[index].read()), index)
        except (RejectedImage, OSError) as error:
            self._reject(index, reason=str(error))
            return None
        if resize is not None:
            return picture
        with self._lock:
            if index not in self._cache and picture.nbytes <= self._room:
                self._room -= picture.nbytes
                self._cache[index] = picture
        return picture

    def first_good(
        self, indices: Iterable[int], *, resize: Resize | None = None
    ) -> NDArray[np.uint8]:
        """The first of ``indices`` that can be used: the next one stands in for a broken one.
        ``resize`` as in :meth:`get`.

        Raises:
            DataError: none can be used, or too many were rejected.
        """
        tried = list[int]()
        for index in indices:
            picture = self.get(index, resize=resize)
            if picture is not None:
                return picture
            tried.append(index)
        name = self._files[tried[0]].name
        raise DataError(
            f"none of the {len(tried)} pictures can be used (the first: {name}: "
            f"{self._rejects.reasons.get(name, 'unknown')}); correct data.paths"
        )

    def _reject(self, index: int, *, reason: str) -> None:
        name = self._files[index].name
        with self._lock:
            self._bad.add(index)
            self._rejects.reasons[name] = reason
            bad, tried = len(self._bad), len(self._tried)
        if too_many(bad=bad, tried=tried):
            raise DataError(
                f"{bad} of {tried} pictures cannot be used (the last: {name}: {reason}); look at "
                "data.paths and remove or mend them"
            )
