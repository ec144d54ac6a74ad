"""Where pictures are looked for: the paths of a configuration, patterns expanded, nothing twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from emu35.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A path or pattern as it is written, and what is there."""

    text: str
    matches: list[Path]


def expand(paths: Sequence[str | Path]) -> list[Place]:
    """
    Raises:
        DataError: a path does not exist.
    """
    places = list[Place]()
    for text in map(str, paths):
        path = Path(text)
        # glob takes a text without a pattern for a file's name.
        matches = [path] if path.exists() else list(map(Path, sorted(glob(text, recursive=True))))
        if not matches:
            raise DataError(f"data path {path} does not exist; correct data.paths")
        places.append(Place(text=text, matches=matches))
    return places


def refuse_repeats(paths: Sequence[Path]) -> None:
    """
    Raises:
        DataError: one of ``paths`` is another one or lies in it, so that its pictures would be used
            twice.
    """
    whose = dict[Path, Path]()
    for path in paths:
        for real in _real(path):
            if real in whose:
                raise DataError(
                    f"{path} is the same as {whose[real]}, and its pictures would be used twice; "
                    "name one of them, once"
                )
        whose.update(dict.fromkeys(_real(path), path))
    for real, path in whose.items():
        for folder in real.parents:
            # What is hidden in a folder is only found where it is named.
            hidden = any(part.startswith(".") for part in real.relative_to(folder).parts)
            if folder in whose and not hidden:
                raise DataError(
                    f"{path} lies in {whose[folder]}, which is named as well, and its pictures "
                    "would be used twice; name one of them"
                )


def _real(path: Path) -> set[Path]:
    """Where ``path`` is found: a link to a file in the folder of the link, too, as folders are
    searched for such links, but not for links to folders."""
    if path.is_dir():
        return {path.resolve()}
    return {path.resolve(), path.parent.resolve() / path.name}
