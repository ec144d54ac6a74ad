"""The one face that image tokenizers show to the rest of emu35."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from emu35.errors import DataError
from emu35.vision.ibq.codec import PRECISION, IBQCodec
from emu35.vision.ibq.folder import WEIGHTS, ibq_codebook, read_folder

CODES_DTYPE = str(PRECISION).removeprefix("torch.")
"""What codes are computed in, as shards record it."""


class ImageCodec(Protocol):
    """Pixels to a grid of codes and back, without gradients.

    ``factor`` pixels along each side make one code; codes lie in [0, ``codebook_size``).
    """

    @property
    def factor(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, H / factor, W / factor]`` int64 of float pixels in [-1, 1].

        Raises:
            DataError: a side is not a positive multiple of ``factor``, or the tokenizer diverged.
        """
        ...

    def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H * factor, W * factor]`` in [-1, 1].

        Raises:
            DataError: a code lies outside the codebook.
        """
        ...

    def latents(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """What ``encode`` finds codes for: fp32 vectors ``[B, D, H / factor, W / factor]``.

        Raises:
            DataError: as ``encode``.
        """
        ...


def decode_grids(
    codec: ImageCodec, grids: Sequence[NDArray[np.integer]]
) -> list[NDArray[np.floating]]:
    """Pixels [3, H, W] in about [-1, 1] of every grid of codes; those of one size are decoded
    together."""
    places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, codes_HW in enumerate(grids):
        places[codes_HW.shape].append(at)
    found: dict[int, NDArray[np.floating]] = {}
    for chosen in places.values():
        codes_BHW = torch.from_numpy(np.stack([grids[at] for at in chosen]).astype(np.int64))
        pixels_B3HW = codec.decode(codes_BHW).cpu().numpy()
        found.update(zip(chosen, pixels_B3HW, strict=True))
    return [found[at] for at in range(len(grids))]


def load_codec(folder: Path, *, device: torch.device | None = None) -> ImageCodec:
    """The tokenizer kept in a release's ``vision_tokenizer`` folder, on ``device`` (CPU if None).

    Raises:
        ReleaseError: the folder is incomplete, damaged, or not an IBQ tokenizer.
    """
    return IBQCodec(read_folder(folder), device=device or torch.device("cpu"), name=str(folder))


def read_codebook(folder: Path) -> torch.Tensor:
    """The embeddings of the codes, fp32 [K, D], of the tokenizer in ``folder``; nothing else of its
    weights is read.

    Raises:
        ReleaseError: the folder is incomplete, damaged, or not an IBQ tokenizer.
    """
    return ibq_codebook(folder)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in ``folder``: how shards remember which tokenizer encoded them.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise DataError(
            f"{folder} holds no image tokenizer ({WEIGHTS} is missing); give the "
            "vision_tokenizer folder of a release or of a run of stage=ibq"
        )
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check its permissions, or copy it again"
        ) from error
