"""The networks that turn pictures into vectors."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emu35.config.dida_eval import Features
from emu35.errors import ConfigError, DataError
from emu35.stages.picture_features import (
    BATCH,
    INCEPTION,
    FeaturesOf,
    Picture,
    require_inception,
)
from emu35.vision.codec import ImageCodec


def open_features(features: Features, *, codec: ImageCodec, device: torch.device) -> FeaturesOf:
    """What turns pictures into vectors.

    Raises:
        ConfigError: its package is not installed, or cannot be imported.
        DataError: its weights cannot be fetched.
    """
    if features is Features.tokenizer:
        return lambda pictures: tokenizer_features(pictures, codec=codec)
    return open_inception(
        device, asked="stage.features=inception", instead="stage.features=tokenizer"
    )


def open_inception(device: torch.device, *, asked: str, instead: str) -> FeaturesOf:
    """The 2048 numbers of a picture that FID is defined by; ``asked`` is the setting that wants
    them, ``instead`` one that does not.

    Raises:
        ConfigError: torch-fidelity is not installed, or cannot be imported.
        DataError: its weights cannot be fetched.
    """
    network = _inception_network(asked=asked, instead=instead).to(device).eval()
    return lambda pictures: _inception_features(pictures, network=network, device=device)


def tokenizer_features(pictures: Sequence[Picture], *, codec: ImageCodec) -> NDArray[np.float64]:
    """Mean and standard deviation over the places of a picture of each of the D numbers of its
    latents before quantization, fp64 [N, 2 D]. The mean alone would not tell a small object from
    a large one of a paler colour."""
    parts: list[torch.Tensor] = []
    for first in range(0, len(pictures), BATCH):
        images_BHW3 = torch.from_numpy(np.stack(pictures[first : first + BATCH]))
        pixels_B3HW = images_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1
        latents_BDL = codec.latents(pixels_B3HW).flatten(2).double()
        parts.append(torch.cat([latents_BDL.mean(2), latents_BDL.std(2, correction=0)], 1))
    return torch.cat(parts).numpy()


def _inception_network(*, asked: str, instead: str) -> Any:
    """The network that FID was defined with, as torch-fidelity ports it."""
    require_inception(asked=asked, instead=instead)
    try:
        module = import_module(f"{INCEPTION}.feature_extractor_inceptionv3")
    except (ImportError, OSError, RuntimeError) as error:
        # The last is what torchvision says where its own library cannot be loaded.
        raise ConfigError(
            f"{asked}: torch-fidelity cannot be imported ({error}); it needs the torchvision that "
            f"was built for torch {torch.__version__}, or use {instead}"
        ) from error
    try:
        return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the weights of Inception-v3 cannot be fetched or read ({error}); try again with a "
            f"network, or use {instead}"
        ) from error


@torch.no_grad()
def _inception_features(
    pictures: Sequence[Picture], *, network: Any, device: torch.device
) -> NDArray[np.float64]:
    parts: list[torch.Tensor] = []
    for first in range(0, len(pictures), BATCH):
        images_BHW3 = torch.from_numpy(np.stack(pictures[first : first + BATCH]))
        (features_BD,) = network(images_BHW3.permute(0, 3, 1, 2).to(device))
        parts.append(features_BD.double().cpu())
    return torch.cat(parts).numpy()
