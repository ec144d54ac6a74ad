"""Every picture as a square, in an order that a step number suffices to find again."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.vision.pictures import cut
from emu35.vision.pictures.cut import Draw
from emu35.vision.pictures.files import PictureFile, Rejects, fingerprint
from emu35.vision.pictures.store import CACHE_BYTES, PictureStore


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def picture_at(sample: int, *, seed: int, count: int) -> int:
    """Index of the picture that is sample number ``sample`` (from 0) of a run, of ``count``."""
    epoch, place = divmod(sample, count)
    return int(_permutation(seed, epoch, count)[place])


class SquarePictures:
    """Square uint8 pictures, by sample number (for training) or by index (for validation).

    A picture is resized such that its shorter side is ``resolution``; a square is cut, at random in
    training and from the middle in validation; of that, training may see a smaller square, ``crop``
    pixels wide, and a share ``flip`` of the samples mirrored. Threads share it.
    """

    def __init__(
        self,
        files: Sequence[PictureFile],
        *,
        resolution: int,
        factor: int,
        seed: int,
        rejects: Rejects,
        crop: int = 0,
        flip: float = 0.0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.files = files
        self.rejects = rejects
        self._crop = crop or resolution
        self._flip = flip
        self._seed = seed
        self._draw = Draw(seed=seed)

        def resize(image: Image.Image, index: int) -> NDArray[np.uint8]:
            del index
            return cut.shorter_side(image, side=resolution, factor=factor)

        self._store = PictureStore(files, resize=resize, rejects=rejects, cache_bytes=cache_bytes)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def identity(self) -> str:
        """Equal where every sample number means the same picture."""
        return fingerprint(self.files)

    def sample(self, sample: int) -> NDArray[np.uint8]:
        """``[3, crop, crop]``, sample number ``sample`` of the run, cut from :meth:`square`.

        Raises:
            DataError: too many pictures were rejected.
        """
        piece = cut.crop(
            self.square(sample),
            width=self._crop,
            height=self._crop,
            draw=self._draw,
            sample=sample,
        )
        return piece[:, :, ::-1] if self._draw.mirrored(sample, share=self._flip) else piece

    def square(self, sample: int) -> NDArray[np.uint8]:
        """``[3, resolution, resolution]``, the square that sample ``sample`` is cut from.

        Raises:
            DataError: too many pictures were rejected.
        """
        count = len(self.files)
        index = picture_at(sample, seed=self._seed, count=count)
        picture = self._store.first_good((index + step) % count for step in range(count))
        return cut.square(picture, position=self._draw.position(sample))

    def centre(self, index: int) -> NDArray[np.uint8] | None:
        """The middle of picture ``index``; None if it is broken."""
        picture = self._store.get(index)
        return None if picture is None else cut.square(picture, position=0.5)
