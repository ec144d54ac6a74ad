"""Pictures for training the image tokenizer."""

from emu35.vision.pictures.aspect import AspectPictures
from emu35.vision.pictures.batches import PictureBatches
from emu35.vision.pictures.files import (
    PictureFile,
    PictureFiles,
    Rejects,
    find_pictures,
    fingerprint,
)
from emu35.vision.pictures.square import SquarePictures, picture_at

__all__ = [
    "AspectPictures",
    "PictureBatches",
    "PictureFile",
    "PictureFiles",
    "Rejects",
    "SquarePictures",
    "find_pictures",
    "fingerprint",
    "picture_at",
]
