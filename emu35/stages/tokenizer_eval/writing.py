"""Pictures with text and what stands in them: drawn, or from disk with ``KEY.txt`` beside."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from emu35.config.tokenizer_eval import TextEvalConfig
from emu35.data.scenes.lines import line_heights, render_lines
from emu35.stages.picture_features import Picture
from emu35.stages.tokenizer_eval.gallery import centre_square, read_picture
from emu35.stages.tokenizer_eval.reading import Reference, truth_beside
from emu35.vision.pictures import PictureFile, Rejects


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPicture:
    """RGB [side, side, 3]; the lines in it with their places if it was drawn, else their texts as a
    file has them, or neither."""

    name: str
    picture: Picture
    drawn: list[Reference] | None = None
    truth: list[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSet:
    """Drawn pictures, then those of ``files``. A picture on disk is cut to a square first, so text
    at the ends of a long one may be lost: it counts as not read off the original either."""

    config: TextEvalConfig
    files: Sequence[PictureFile]
    seed: int

    def __len__(self) -> int:
        return self.config.generated + len(self.files)

    def load(self, number: int, *, side: int, rejects: Rejects) -> TextPicture | None:
        """Picture ``number``; None if it cannot be used, and named in ``rejects`` then."""
        if number < self.config.generated:
            heights = line_heights(self.config.heights)
            image, lines = render_lines(number, side=side, heights=heights, seed=self.seed)
            return TextPicture(
                name=f"generated text {number}",
                picture=np.asarray(image),
                drawn=[Reference(text=line.text, box=line.box) for line in lines],
            )
        file = self.files[number - self.config.generated]
        image = read_picture(file, rejects=rejects)
        if image is None:
            return None
        try:
            truth = _truth(file)
        except (OSError, UnicodeDecodeError) as error:
            rejects.reasons[file.name] = f"the text beside it cannot be read: {error}"
            return None
        return TextPicture(name=file.name, picture=centre_square(image, side=side), truth=truth)


def _truth(file: PictureFile) -> list[str] | None:
    if not file.member:
        return truth_beside(file.path)
    place = _texts(file.path).get(_key(file.member))
    if place is None:
        return None
    offset, size = place
    with file.path.open("rb") as tar:
        tar.seek(offset)
        return tar.read(size).decode("utf-8").splitlines()


def _key(member: str) -> str:
    """A member's name without its ending, however the tar spells its folder ('./a.png')."""
    return str(PurePosixPath(member).with_suffix(""))


@lru_cache(maxsize=8)
def _texts(path: Path) -> dict[str, tuple[int, int]]:
    """Members ``KEY.txt`` of a tar, as far as it can be read: key -> offset and size."""
    found: dict[str, tuple[int, int]] = {}
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.isfile() and member.name.endswith(".txt"):
                    found[_key(member.name)] = (member.offset_data, member.size)
        except tarfile.TarError:
            return found  # it ends early, which whoever lists its pictures has named
    return found
