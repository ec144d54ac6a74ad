"""The one face that image tokenizers show to the rest of emu35."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from emu35.errors import DataError, ReleaseError
from emu35.vision.ibq.codec import PRECISION, IBQCodec
from emu35.vision.ibq.folder import (
    WEIGHTS,
    Layout,
    ibq_codebook,
    ibq_digest,
    layout_of,
    read_config,
    read_folder,
)
from emu35.vision.ibq.hf_folder import HF_WEIGHTS
from emu35.vision.plugged import (
    CodecTrust,
    is_plugged,
    load_plugged,
    plugged_digest,
    read_plug,
)

CODES_DTYPE = str(PRECISION).removeprefix("torch.")
"""What IBQ computes codes in, as shards record it."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecFacts:
    """What the folder of a tokenizer says of it; ``dtype`` is what codes are computed in."""

    factor: int
    codebook_size: int
    dtype: str


def codec_facts(folder: Path) -> CodecFacts:
    """What is known of the tokenizer in ``folder`` without its weights, and without running code.

    Raises:
        ReleaseError: the folder is incomplete, damaged, or holds no tokenizer.
    """
    if is_plugged(folder):
        plug = read_plug(folder)
        return CodecFacts(factor=plug.factor, codebook_size=plug.codebook_size, dtype=plug.dtype)
    config = read_config(folder)
    return CodecFacts(factor=config.factor, codebook_size=config.n_embed, dtype=CODES_DTYPE)


def codes_dtype(folder: Path) -> str:
    """What the tokenizer in ``folder`` computes codes in, as shards record it.

    Raises:
        ReleaseError: it is of another package, and its ``codec.yaml`` cannot be read.
    """
    return read_plug(folder).dtype if is_plugged(folder) else CODES_DTYPE


def load_codec(
    folder: Path,
    *,
    device: torch.device | None = None,
    trust: CodecTrust = CodecTrust.environment,
) -> ImageCodec:
    """The tokenizer in ``folder``, on ``device`` (CPU if None): IBQ in either layout
    (:mod:`emu35.vision.ibq.folder`), or one of another package (:mod:`emu35.vision.plugged`) if
    ``trust`` permits its code to be run.

    Raises:
        ReleaseError: the folder is incomplete, damaged, or holds no tokenizer, or its code may not
            be run.
    """
    device = device or torch.device("cpu")
    if is_plugged(folder):
        return load_plugged(folder, device=device, trust=trust)
    return IBQCodec(read_folder(folder), device=device, name=str(folder))


def read_codebook(folder: Path) -> torch.Tensor:
    """The embeddings of the codes, fp32 [K, D], of the tokenizer in ``folder``; of an IBQ's weights
    nothing else is read.

    Raises:
        ReleaseError: as :func:`load_codec`, or the tokenizer has no such embeddings.
    """
    if is_plugged(folder):
        device = torch.device("cpu")
        return load_plugged(folder, device=device, trust=CodecTrust.environment).codebook_KD
    return ibq_codebook(folder)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in ``folder``: how shards remember which tokenizer encoded them.

    A folder that was converted from another layout has the digest of the one that it comes from; a
    tokenizer of another package has one of all its files.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    path = folder / (HF_WEIGHTS if layout_of(folder) is Layout.hf else WEIGHTS)
    try:
        if is_plugged(folder):
            return plugged_digest(folder)
        if not path.is_file():
            raise DataError(
                f"{folder} holds no image tokenizer ({path.name} is missing); give the "
                "vision_tokenizer folder of a release or of a run of stage=ibq"
            )
        return ibq_digest(folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read ({error.strerror}); check its permissions, "
            "or copy it again"
        ) from error
    except ReleaseError as error:
        raise DataError(str(error)) from error
