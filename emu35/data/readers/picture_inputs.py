"""Inputs that are pictures and nothing else: tars in webdataset layout, and folders.

A folder becomes several inputs, stretches of its pictures in the order of their names, so that
workers can share it and an interruption costs a stretch.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from emu35.data.readers.discover import TARS, InputFile, as_folder, file_fingerprint, refuse_repeats
from emu35.data.readers.folder import SIDES, extension, list_files, read_pictures
from emu35.data.readers.records import Captions, RawRecord, Reject
from emu35.data.readers.webdataset import PICTURES, read_webdataset
from emu35.errors import DataError

STRETCH = 1024
"""Pictures of a folder that are one input."""


def find_picture_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """Resolve tars and folders into inputs; captions beside pictures are read, and not needed.

    A folder stands for its tars if it holds any at its top, else for the pictures below it.

    Raises:
        DataError: a path does not exist, is neither, holds no picture, or is given twice.
    """
    found: list[InputFile] = []
    for path in paths:
        if path.is_dir():
            found.extend(_of_folder(path.resolve()))
        elif path.is_file() and path.name.lower().endswith(TARS):
            found.append(_of_tar(path.resolve()))
        elif path.exists():
            raise DataError(f"input {path} is no tar; give image tars, or folders of pictures")
        else:
            raise DataError(f"input {path} does not exist; give files or folders that do")
    refuse_repeats(found)
    return found


def _of_folder(folder: Path) -> list[InputFile]:
    tars = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(TARS)
    )
    if tars:
        return [_of_tar(path) for path in tars]
    found = list_files(folder)
    pictures = [path for path in found if extension(path) in PICTURES]
    if not pictures:
        raise DataError(f"folder {folder} holds neither tars nor pictures; give one that does")
    facts = {path for path in found if path.suffix in SIDES and path.is_file()}
    stretches = [pictures[first : first + STRETCH] for first in range(0, len(pictures), STRETCH)]
    return [
        as_folder(
            folder,
            files=files,
            reader=partial(_read_stretch, files=files, folder=folder),
            name=folder.with_name(f"{folder.name}#{number:06d}"),
            beside=[
                side for path in files for side in map(path.with_suffix, SIDES) if side in facts
            ],
        )
        for number, files in enumerate(stretches)
    ]


def _of_tar(path: Path) -> InputFile:
    return InputFile(
        path=path,
        size=path.stat().st_size,
        fingerprint=file_fingerprint(path),
        reader=partial(read_webdataset, captions=Captions.optional),
    )


def _read_stretch(
    name: Path, *, files: Sequence[Path], folder: Path
) -> Iterator[RawRecord | Reject]:
    del name
    return read_pictures(files, folder=folder, captions=Captions.optional)
