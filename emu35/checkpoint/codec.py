"""The image tokenizer that belongs to a language model."""

from pathlib import Path

from emu35.checkpoint.source import Described
from emu35.errors import ConfigError
from emu35.parallel.device import local_device
from emu35.vision.codec import ImageCodec, load_codec


def codec_folder(described: Described, *, chosen: Path | None) -> Path | None:
    """Where the image tokenizer lies: in the ``chosen`` folder, else where the source says; None
    where it says nothing or there is nothing."""
    folder = chosen or described.vision_folder
    return folder if folder is not None and folder.is_dir() else None


def open_codec(described: Described, *, chosen: Path | None = None) -> ImageCodec:
    """Load the image tokenizer that the model's codes belong to.

    Raises:
        ConfigError: there is none, or its codebook is another one.
        ReleaseError: it is damaged.
    """
    folder = codec_folder(described, chosen=chosen)
    if folder is None:
        missing = chosen or described.vision_folder
        found = (
            f"image tokenizer {missing} does not exist"
            if missing
            else f"{described.path} names no image tokenizer, so its codes cannot become pictures"
        )
        raise ConfigError(
            f"{found}; give its folder (config.yaml and model.ckpt) with --vision FOLDER"
        )
    codec = load_codec(folder, device=local_device())
    codes = described.tokenizer.codebook_size
    if codec.codebook_size != codes:
        raise ConfigError(
            f"image tokenizer {folder} has {codec.codebook_size} codes, but the language model "
            f"has {codes}; use the one that its data was made with"
        )
    return codec
