"""The picture that a field of a record names: a file, or in parquet its bytes."""

from pathlib import Path
from typing import Any, cast

from emu35.data.readers.records import PictureData, Reason, is_readable

PICTURE_FILES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
"""Endings of files that are read as pictures."""

_ADDRESSES = ("http://", "https://", "s3://", "gs://", "ftp://")


class WrongPicture(Exception):
    """A value that is no picture of any form."""


class NoPicture(Exception):
    """A picture that is named and not there; ``reason`` is how it is counted."""

    def __init__(self, detail: str, *, reason: Reason) -> None:
        super().__init__(detail)
        self.reason = reason


def named_picture(value: Any, *, folder: Path, where: str) -> PictureData:
    """The bytes or the file of a picture; relative paths start at ``folder``.

    Raises:
        WrongPicture: if ``value`` is neither a path nor bytes.
        NoPicture: if there is no such file, or it is an address on the network.
    """
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        if isinstance(fields.get("bytes"), bytes):
            return fields["bytes"]
        if "path" in fields and fields.get("bytes") is None:
            value = fields["path"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        raise WrongPicture(f"{where} is a list; several pictures need the form 'parts'")
    if not isinstance(value, str):
        raise WrongPicture(f"{where} is {'null' if value is None else 'no string'}, not a path")
    if value.lower().startswith(_ADDRESSES):
        raise NoPicture(
            f"{where}: {value}; download the pictures first (img2dataset does) and name the files",
            reason=Reason.not_downloaded,
        )
    path = folder / value
    if not is_readable(path):
        raise NoPicture(f"{where}: {value}", reason=Reason.missing_file)
    return path
