"""What the readers give and the page takes, and how a picture gets its bytes."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image as PillowImage

from emu35.data.story import Picture, Story, StoryImage, read_picture
from emu35.errors import DataError
from emu35.vision.resize import open_image


@dataclass(kw_only=True, slots=True)
class Shown:
    """A story to show, or the name of one that could not be read (``story`` None).

    ``problems`` has a line for everything that is wrong with it so far. ``folder`` is where its
    pictures lie that have an ``image_path`` instead of bytes; None: such pictures are not shown.
    """

    story: Story | None
    name: str = ""
    problems: list[str] = field(default_factory=list[str])
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPicture:
    """A picture that was decoded to its last pixel: what it is, its file, and its pixels (RGB)."""

    picture: Picture
    pixels: PillowImage.Image


def load_picture(image: StoryImage, *, folder: Path | None) -> LoadedPicture:
    """The picture of ``image``, from its bytes or from its path within ``folder``.

    Raises:
        DataError: there is no picture, it lies outside the folder, or it cannot be decoded.
    """
    picture = image.image or Picture()
    content = picture.image_data
    if not content and picture.image_path:
        if folder is None:
            raise DataError("it is only a path, and no folder is given to find it in")
        content = read_inside(folder, picture.image_path)
    if not content:
        raise DataError("it has neither bytes nor a path")
    # The header is judged first: a format that browsers do not show is no damage.
    found = read_picture(content)
    return LoadedPicture(picture=found, pixels=open_image(content))


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of the file ``name`` of ``folder``, which it must not leave, by a link or a path.

    Raises:
        DataError: it does, or the file cannot be read.
    """
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise DataError(f"it lies outside {folder}; only files within that folder are read")
        if not path.is_file():
            raise DataError("the file is missing" if not path.exists() else "it is no file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"it cannot be read: {reason}") from error


def picture_name(image: StoryImage, *, default: str) -> str:
    """What messages call the picture of ``image``."""
    path = image.image.image_path if image.image else ""
    return path or image.image_id or default
