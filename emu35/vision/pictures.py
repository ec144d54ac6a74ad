"""Pictures for training the image tokenizer: which file comes when, cropped to a square.

Three questions, three answers. *What is there?* :func:`find_pictures` lists files of folders and
members of webdataset tars, in one fixed order. *Which one now?* :func:`picture_at` is a pure
function of seed and sample number: every epoch is a permutation of its own, so a resumed run needs
nothing but its step number, and any number of ranks shares the same sequence. *What if it is
broken?* The next picture in the list takes its place, and its name and reason go to the
:class:`Rejects`, which end as one file in the run folder.

A picture is resized by the rule of ``smart_resize`` such that its shorter side is the resolution,
then a square is cut: at random in training (again a function of seed and sample number), from the
middle in validation. A square picture is thus used whole, unless training asks for crops, smaller
squares at random places within. Resized pictures stay in memory as bytes
until ``CACHE_BYTES`` are full; what does not fit is decoded anew each time.
"""

import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.errors import DataError
from emu35.vision.resize import RejectedImage, open_image, smart_resize

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})

CACHE_BYTES = 2 << 30
"""Memory for resized pictures: 70,000 of 96 px or 10,000 of 256 px."""

LONGEST = 2
"""Longest side kept, in multiples of the resolution; the rest is cut off evenly before resizing."""

TOLERATED_REJECTS = 10
TOLERATED_SHARE = 0.1
"""Training stops when more pictures than both of these (of those tried) were rejected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFile:
    """Where the bytes of one picture lie. ``member`` is empty for a file of its own."""

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """What messages call it: the path, and the member within a tar."""
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if not self.member:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Rejects:
    """Pictures that could not be used: name -> reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)


def find_pictures(paths: Sequence[str | Path], *, rejects: Rejects) -> list[PictureFile]:
    """Every picture under ``paths`` (folders, tars, picture files), by suffix, in a fixed order.

    Folders are searched to the bottom for pictures and tars alike. A tar that ends early gives
    what it holds and is named among ``rejects``.

    Raises:
        DataError: a path does not exist, a tar cannot be read, or there is no picture at all.
    """
    found: list[PictureFile] = []
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise DataError(f"data path {path} does not exist; correct data.paths")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.suffix.lower() == ".tar":
                found.extend(_members(file, rejects=rejects))
            elif file.suffix.lower() in SUFFIXES:
                found.append(PictureFile(path=file, size=file.stat().st_size))
    if not found:
        places = ", ".join(str(path) for path in paths) or "an empty list of paths"
        raise DataError(
            f"no picture in {places}; expected files ending in {', '.join(sorted(SUFFIXES))}, "
            "or tars of them"
        )
    return found


def _members(path: Path, *, rejects: Rejects) -> Iterator[PictureFile]:
    """Pictures of an uncompressed tar, as far as its headers can be read."""
    found = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    found += 1
                    yield PictureFile(
                        path=path, member=member.name, offset=member.offset_data, size=member.size
                    )
    except (tarfile.TarError, OSError) as error:
        if not found:
            raise DataError(
                f"{path} cannot be read as an uncompressed tar ({error}); copy or pack it again"
            ) from error
        rejects.reasons[str(path)] = f"tar ends early, after {found} pictures: {error}"


def fingerprint(files: Sequence[PictureFile]) -> str:
    """Hash of the names within their paths and of the sizes: equal where the order is equal."""
    digest = sha256()
    for file in files:
        entry = f"{file.path.name}\0{file.member}\0{file.size}\n"
        # Names are bytes; those that are no UTF-8 reach Python as lone surrogates.
        digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def picture_at(sample: int, *, seed: int, count: int) -> int:
    """Index of the picture that is sample number ``sample`` (from 0) of a run, of ``count``."""
    epoch, place = divmod(sample, count)
    return int(_permutation(seed, epoch, count)[place])


class SquarePictures:
    """Square uint8 pictures, by sample number (for training) or by index (for validation)."""

    def __init__(
        self,
        files: Sequence[PictureFile],
        *,
        resolution: int,
        factor: int,
        seed: int,
        rejects: Rejects,
        crop: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.files = files
        self.rejects = rejects
        self._resolution = resolution
        self._crop = crop or resolution
        self._factor = factor
        self._seed = seed
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes
        self._bad: set[int] = set()
        self._tried: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, sample: int) -> NDArray[np.uint8]:
        """``[3, crop, crop]``, sample number ``sample`` of the run, cut from :meth:`square`.

        Raises:
            DataError: too many pictures were rejected.
        """
        space = self._resolution - self._crop + 1
        rng = np.random.default_rng([self._seed, 2, sample])
        top, left = rng.integers(space, size=2).tolist()
        square_3RR = self.square(sample)
        return square_3RR[:, top : top + self._crop, left : left + self._crop]

    def square(self, sample: int) -> NDArray[np.uint8]:
        """``[3, resolution, resolution]``, the square that sample ``sample`` is cut from.

        Raises:
            DataError: too many pictures were rejected.
        """
        index = picture_at(sample, seed=self._seed, count=len(self.files))
        position = float(np.random.default_rng([self._seed, 1, sample]).random())
        for step in range(len(self.files)):
            picture = self._resized((index + step) % len(self.files))
            if picture is not None:
                return _square(picture, position=position)
        raise DataError(self._all_bad())

    def centre(self, index: int) -> NDArray[np.uint8] | None:
        """The middle of picture ``index``; None if it is broken."""
        picture = self._resized(index)
        return None if picture is None else _square(picture, position=0.5)

    def _resized(self, index: int) -> NDArray[np.uint8] | None:
        """Picture ``index``, shorter side = resolution; None once rejected."""
        if index in self._cache:
            return self._cache[index]
        if index in self._bad:
            return None
        self._tried.add(index)
        file = self.files[index]
        try:
            picture = _resize(
                open_image(file.read()), resolution=self._resolution, factor=self._factor
            )
        except (RejectedImage, OSError) as error:
            self._reject(index, reason=str(error))
            return None
        if picture.nbytes <= self._room:
            self._room -= picture.nbytes
            self._cache[index] = picture
        return picture

    def _reject(self, index: int, *, reason: str) -> None:
        self._bad.add(index)
        self.rejects.reasons[self.files[index].name] = reason
        bad, tried = len(self._bad), len(self._tried)
        if bad > TOLERATED_REJECTS and bad > TOLERATED_SHARE * tried:
            raise DataError(
                f"{bad} of {tried} pictures cannot be used (the last: {self.files[index].name}: "
                f"{reason}); look at data.paths and remove or mend them"
            )

    def _all_bad(self) -> str:
        name = self.files[0].name
        return (
            f"none of the {len(self.files)} pictures can be used (the first: {name}: "
            f"{self.rejects.reasons.get(name, 'unknown')}); correct data.paths"
        )


def _resize(image: Image.Image, *, resolution: int, factor: int) -> NDArray[np.uint8]:
    """uint8 [3, H, W] whose shorter side is ``resolution``, the longer at most twice that."""
    width, height = image.size
    kept_width, kept_height = min(width, LONGEST * height), min(height, LONGEST * width)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    image = image.crop((left, top, left + kept_width, top + kept_height))
    longer, shorter = max(image.size), min(image.size)
    new_width, new_height = smart_resize(
        width=image.width,
        height=image.height,
        area=round(resolution**2 * longer / shorter),
        factor=factor,
    )
    # Rounding to the factor may move the shorter side by one notch; the crop needs it exact.
    size = (max(new_width, resolution), max(new_height, resolution))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _square(picture_3HW: NDArray[np.uint8], *, position: float) -> NDArray[np.uint8]:
    """A square cut at ``position`` (0: left or top end, 1: the other) along the longer side."""
    _, height, width = picture_3HW.shape
    side = min(height, width)
    top, left = (round(position * (length - side)) for length in (height, width))
    return picture_3HW[:, top : top + side, left : left + side]


class PictureBatches:
    """This rank's share of every global batch, the next one decoded in the background.

    Rank r of ``ranks`` takes the r-th equal part of the batch, so the global batch is the same
    whatever the number of ranks.
    """

    def __init__(
        self, pictures: SquarePictures, *, global_batch_size: int, rank: int, ranks: int
    ) -> None:
        self._pictures = pictures
        self._batch = global_batch_size
        self._share = global_batch_size // ranks
        self._first = rank * self._share
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._next: tuple[int, Future[NDArray[np.uint8]]] | None = None

    def step(self, step: int) -> NDArray[np.uint8]:
        """uint8 ``[global batch / ranks, 3, H, W]`` of training step ``step`` (from 1).

        Raises:
            DataError: too many pictures were rejected.
        """
        if self._next is not None and self._next[0] == step:
            ready = self._next[1]
        else:
            self._drop_next()
            ready = self._worker.submit(self._load, step)
        pictures = ready.result()
        self._next = (step + 1, self._worker.submit(self._load, step + 1))
        return pictures

    def close(self) -> None:
        """Let the background thread finish what it is at, and end it."""
        self._drop_next()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> NDArray[np.uint8]:
        first = (step - 1) * self._batch + self._first
        return np.stack([self._pictures.sample(first + slot) for slot in range(self._share)])

    def _drop_next(self) -> None:
        if self._next is not None:
            self._next[1].cancel()
            self._next = None
