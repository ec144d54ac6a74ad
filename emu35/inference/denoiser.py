"""Where parallel decoding gets its path from: the run or release that was adapted to it.

A path is opened by every rank for itself, so what travels is where it lies, not the codebook.
"""

from dataclasses import dataclass
from pathlib import Path as Folder

import torch

from emu35.checkpoint.codec import codec_folder
from emu35.checkpoint.source import Described
from emu35.config import PathConfig, PathKind
from emu35.dida.path import build_path
from emu35.errors import ConfigError
from emu35.inference.denoise import Denoiser
from emu35.vision.codec import read_codebook


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserSource:
    """The numbers of a path and the image tokenizer whose ``codes`` it measures (None for paths
    that measure nothing)."""

    path: PathConfig
    codes: int
    folder: Folder | None

    def open(self, device: torch.device) -> Denoiser:
        """The path, on ``device``.

        Raises:
            ConfigError: the image tokenizer has another codebook.
            ReleaseError: it is damaged.
        """
        codebook_KD = torch.empty(self.codes, 0)
        if self.folder is not None:
            codebook_KD = read_codebook(self.folder)
        if len(codebook_KD) != self.codes:
            raise ConfigError(
                f"image tokenizer {self.folder} has {len(codebook_KD)} codes, but the language "
                f"model has {self.codes}; use the one that its data was made with"
            )
        return Denoiser(path=build_path(self.path, codebook_KD=codebook_KD.to(device)))


def find_denoiser(described: Described, *, chosen: Folder | None = None) -> DenoiserSource | None:
    """What an engine of ``described`` decodes pictures in parallel with; None where the model was
    not adapted to that, or where its path measures distances in a codebook that is not there.
    ``chosen`` overrides the source's own image tokenizer."""
    if described.noise is None:
        return None
    folder = None
    if described.noise.kind is PathKind.metric:
        folder = codec_folder(described, chosen=chosen)
        if folder is None:
            return None
    return DenoiserSource(
        path=described.noise, codes=described.tokenizer.codebook_size, folder=folder
    )


def needed_denoiser(described: Described, *, chosen: Folder | None = None) -> DenoiserSource:
    """The same where some request decodes in parallel.

    Raises:
        ConfigError: there is none, and why.
    """
    found = find_denoiser(described, chosen=chosen)
    if found is not None:
        return found
    if described.noise is None:
        raise ConfigError(
            f"{described.path} was not adapted to parallel decoding; use a run or a release of "
            "stage=dida, or decoder ar"
        )
    raise ConfigError(
        f"{described.path} was adapted to parallel decoding with distances in a codebook, but the "
        f"image tokenizer {chosen or described.vision_folder} is not there; give its folder "
        "(config.yaml and model.ckpt) with --vision FOLDER"
    )
