"""SigLIP, or another vision transformer, as a teacher: a folder as transformers saves it.

Suffixes beyond the package's: R side of the pictures that the network takes, P tokens.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import interpolate

from emu35.errors import ConfigError

OWNER = "stage.distillation.teacher"
CONFIG = "config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The second is what transformers 5 writes beside a tokenizer."""

UNUSED = ("head.", "pooler.", "vision_model.head.")
"""Weights that only a pooled vector needs: a checkpoint may lack them."""


class VisionTower:
    """The last hidden states of a vision transformer, its patches' as a grid.

    A checkpoint of both towers (SiglipModel, CLIPModel) gives its vision tower; DINOv2, ViT and
    others whose tokens are ``[class, registers..., patches]`` work as well. Pictures are resized to
    the network's square by antialiased bicubic interpolation, as SigLIP's own processor does, and
    normalised with the folder's mean and deviation. SigLIP large at 256 pixels gives 1024 channels
    on a grid of 16 x 16.
    """

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        """
        Raises:
            ConfigError: transformers is not installed, the folder lacks a file or weights, or the
                network takes something else than square pictures.
        """
        self._folder = folder
        mean, std = _normalisation(folder)
        self._tower, side, patch = _load(folder)
        self._tower.to(device).eval().requires_grad_(False)
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._side, self._grid = side, side // patch
        self.channels = self._probe(device)

    @torch.no_grad()
    def __call__(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to fp32 ``[B, C, h, w]``."""
        with torch.autocast(pixels_B3HW.device.type, enabled=False):
            output = self._tower(pixel_values=self._prepared(pixels_B3HW.float()))
        states_BPC = cast(torch.Tensor, output.last_hidden_state)
        patches_BPC = states_BPC[:, states_BPC.shape[1] - self._grid**2 :]
        return patches_BPC.transpose(1, 2).unflatten(2, (self._grid, self._grid)).float()

    def _prepared(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Pixels as the network learnt from them, ``[B, 3, R, R]``."""
        square = (self._side, self._side)
        if pixels_B3HW.shape[-2:] != square:
            pixels_B3HW = interpolate(pixels_B3HW, size=square, mode="bicubic", antialias=True)
        shown_B3RR = (pixels_B3HW.clamp(-1, 1) + 1) / 2
        return (shown_B3RR - self._mean) / self._std

    def _probe(self, device: torch.device) -> int:
        """Number of channels, found by trying."""
        blank = torch.zeros(1, 3, self._side, self._side, device=device)
        try:
            with torch.no_grad():
                states_BPC = self._tower(pixel_values=blank).last_hidden_state
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{OWNER}={self._folder} does not take pictures of {self._side} x {self._side} "
                f"pixels as pixel_values ({error}); use SigLIP of a fixed resolution"
            ) from error
        if states_BPC.ndim != 3 or states_BPC.shape[1] < self._grid**2:
            raise ConfigError(
                f"{OWNER}={self._folder} gives hidden states of shape {tuple(states_BPC.shape)} "
                f"where {self._grid} x {self._grid} patches are expected; use a plain vision "
                "transformer such as SigLIP"
            )
        return int(states_BPC.shape[2])


def _load(folder: Path) -> tuple[torch.nn.Module, int, int]:
    """(fp32 network, pixels a side, pixels a side of a patch)."""
    transformers = _transformers()
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{OWNER}={folder} has no {CONFIG}; give the folder of a SigLIP checkpoint as "
            "transformers saves it"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        config = getattr(config, "vision_config", config)
        with _quiet(transformers):
            tower, report = transformers.AutoModel.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{OWNER}={folder} cannot be loaded ({error})") from error
    # What a checkpoint lacks is drawn at random, and a random teacher teaches nothing.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED))
    if missing or report["mismatched_keys"]:
        names = ", ".join([*missing, *map(str, report["mismatched_keys"])][:3])
        raise ConfigError(f"{OWNER}={folder} lacks weights of {config.model_type}: {names} ...")
    side, patch = (_whole(getattr(config, name, None)) for name in ("image_size", "patch_size"))
    if not side or not patch:
        raise ConfigError(
            f"{OWNER}={folder} is of type {config.model_type}, which has no square image_size and "
            "patch_size; use SigLIP of a fixed resolution"
        )
    return tower, side, patch


def _whole(size: Any) -> int:
    """The side of a square given as one number or two; 0 for anything else."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else 0


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """(mean, deviation) a channel, of pixels in [0, 1]."""
    for name in PREPROCESSORS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            said = said.get("image_processor", said)
            mean, std = said["image_mean"], said["image_std"]
            if len(mean) == len(std) == 3 and all(number > 0 for number in std):
                return mean, std
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{OWNER}: {path} cannot be read as a preprocessor's configuration ({error!r}); it "
                "must have image_mean and image_std"
            ) from error
        raise ConfigError(
            f"{OWNER}: {path} has image_mean={mean} and image_std={std}; they must be three "
            "numbers each, the latter positive"
        )
    raise ConfigError(
        f"{OWNER}={folder} has no {' or '.join(PREPROCESSORS)}, which say how it wants its pixels; "
        "copy the file from where the weights came from"
    )


def _transformers() -> Any:
    try:
        import transformers
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"{OWNER} needs transformers, which cannot be imported ({error}); "
            "pip install 'emu35[verify]', or use stage.distillation.weight=0"
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the list of the text tower's weights, which are left out on purpose."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
