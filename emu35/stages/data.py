"""``emu35 data ingest|pack|index``: files into token shards, shards into packed rows, indices.

Here the image tokenizer meets the data: :mod:`emu35.data` asks for codes through a protocol, and
:class:`VisionPictures` answers with :mod:`emu35.vision`.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image, Resampling

from emu35.config.area import Area
from emu35.data.index import (
    build_index,
    find_shards,
    shard_names,
    verify_index,
    verify_index_in,
)
from emu35.data.index_file import ShardIndex
from emu35.data.ingest.ingest import ingest as ingest_files
from emu35.data.ingest.options import IngestOptions, IngestSummary
from emu35.data.ingest.pictures import UnusablePicture
from emu35.data.packed import PackOptions, PackSummary, pack_sources
from emu35.data.place import Url, place_of
from emu35.data.storage import open_folder
from emu35.errors import ConfigError, DataError
from emu35.vision.codec import ImageCodec, codes_dtype, load_codec, weights_digest
from emu35.vision.plugged import CodecTrust
from emu35.vision.resize import RejectedImage, open_image, smart_resize, to_pixels


class VisionPictures:
    """A :class:`~emu35.data.ingest.pictures.PictureEncoder` over the tokenizer in ``folder``.

    The network is loaded when the first picture needs it, so that text alone never does.
    """

    def __init__(
        self,
        *,
        folder: Path,
        area: Area,
        codebook_size: int,
        trust: CodecTrust = CodecTrust.environment,
    ) -> None:
        """Raises: DataError or ReleaseError if ``folder`` holds no image tokenizer."""
        self.digest = weights_digest(folder)
        self.dtype = codes_dtype(folder)
        self._trust = trust
        self._folder = folder
        self._area = area
        self._codebook_size = codebook_size
        self._begin(worker=0)

    def _begin(self, *, worker: int) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._loaded: ImageCodec | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to load the network itself; the digest is not taken again."""
        return {
            "digest": self.digest,
            "dtype": self.dtype,
            "_trust": self._trust,
            "_folder": self._folder,
            "_area": self._area,
            "_codebook_size": self._codebook_size,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(worker=0)

    def join(self, *, worker: int, workers: int) -> None:
        """Use the GPUs in turn, and no more cores than this worker's share.

        On a CPU, attention adds in another order with another number of threads, which moves
        latents by about 1e-6: a code whose runner-up is as near as that may differ between numbers
        of workers. A fixed number of threads would leave most cores idle, or fight over them.
        """
        self._worker = worker
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))

    @property
    def factor(self) -> int:
        return self._codec().factor

    def check(self) -> None:
        """Load the network now.

        Raises:
            ConfigError: if its codebook has another size than was asked for.
            ReleaseError: if the folder is incomplete or damaged.
        """
        self._codec()

    def prepare(self, data: bytes | Path) -> Image:
        """Open, check and resize one picture.

        Raises:
            UnusablePicture: with the reason.
        """
        try:
            image = open_image(data)
            width, height = image.size
            area = self._area.of(width=width, height=height)
            size = smart_resize(width=width, height=height, area=area, factor=self.factor)
        except RejectedImage as error:
            raise UnusablePicture(reason=error.reason.value, detail=error.detail) from error
        resized = image.resize(size, Resampling.BICUBIC)
        resized.info = {"source_size": image.size}
        return resized

    def encode(self, pictures: Sequence[Image]) -> list[npt.NDArray[np.integer[Any]]]:
        """Codes [H, W] of pictures of one size."""
        pixels_B3HW = np.stack([to_pixels(picture) for picture in pictures])
        codes_BHW = self._codec().encode(torch.from_numpy(pixels_B3HW))
        return list(codes_BHW.numpy())

    def _codec(self) -> ImageCodec:
        with self._lock:
            if self._loaded is None:
                device = torch.device("cpu")
                if torch.cuda.is_available():
                    device = torch.device("cuda", self._worker % torch.cuda.device_count())
                codec = load_codec(self._folder, device=device, trust=self._trust)
                if codec.codebook_size != self._codebook_size:
                    raise ConfigError(
                        f"tokenizer.codebook_size={self._codebook_size}, but the image tokenizer "
                        f"in {self._folder} has {codec.codebook_size} codes; "
                        f"use --codebook-size {codec.codebook_size}"
                    )
                self._loaded = codec
            return self._loaded


@contextlib.contextmanager
def file_errors() -> Generator[None, None, None]:
    """Turn what the file system refuses (permissions, full disks) into an error of the user's."""
    try:
        yield
    except OSError as error:
        raise DataError(
            # What libraries raise on their own has a text but neither a file nor an errno.
            f"{error.filename or 'reading or writing'}: {error.strerror or error}; "
            "check the path, its permissions and the space left, then run the same command again"
        ) from error


@file_errors()
def ingest(options: IngestOptions, *, trust: CodecTrust = CodecTrust.environment) -> IngestSummary:
    """Ingest as asked and print a summary; run again, it goes on where it was stopped. ``trust``
    says whether an image tokenizer of another package may be run.

    Raises:
        Emu35Error: see :func:`emu35.data.ingest.ingest.ingest`.
    """
    options.validate()
    vision = options.tokenizer.vision
    encoder = None
    if vision is not None:
        encoder = VisionPictures(
            folder=Path(vision),
            area=options.area,
            codebook_size=options.tokenizer.codebook_size,
            trust=trust,
        )
    summary = ingest_files(options, encoder=encoder)
    print(f"{options.out}: " + "\n".join(summary.lines()))
    return summary


@file_errors()
def pack(options: PackOptions) -> PackSummary:
    """Pack folders of shards into rows and print a summary.

    Raises:
        Emu35Error: see :func:`emu35.data.packed.pack_sources`.
    """
    summary = pack_sources(options)
    print(f"{options.out}: " + "\n".join(summary.lines()))
    return summary


@dataclass(kw_only=True, slots=True)
class IndexOptions:
    """``emu35 data index``: rebuild the indices of folders, or with ``verify`` only check them."""

    folders: Sequence[str | Path]
    verify: bool = False


@file_errors()
def index(options: IndexOptions) -> None:
    """Rebuild every index, or hash every shard and compare; prints a line a folder.

    Raises:
        DataError: naming each shard that is damaged or does not match its index.
    """
    problems: list[str] = []
    for place in map(place_of, options.folders):
        if isinstance(place, Path):
            work = verify_index if options.verify else build_index
            actions = [partial(work, shard) for shard in find_shards(place)]
        else:
            actions = _remote_checks(place, verify=options.verify)
        documents = rows = 0
        for action in actions:
            try:
                found = action()
                documents += len(found) if found.meta.packed is None else len(found.pieces)
                rows += 0 if found.meta.packed is None else len(found)
            except DataError as error:
                problems.append(str(error))
        verb = "verified" if options.verify else "indexed"
        held = f"{documents} documents" if not rows else f"{rows} rows of {documents} pieces"
        print(f"{place}: {verb} {len(actions)} shards, {held}")
    if problems:
        raise DataError("\n".join(problems))


def _remote_checks(place: Url, *, verify: bool) -> list[Callable[[], ShardIndex]]:
    if not verify:
        raise ConfigError(
            f"indices cannot be written to {place}; index the shards where they were written and "
            "upload them, or check them with --verify"
        )
    folder = open_folder(place, message=print)
    return [partial(verify_index_in, folder, name=name) for name in shard_names(folder)]
