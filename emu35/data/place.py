"""Where a folder of shards or a shard lies: a local path, or a URL of an object store or server."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
_LOCAL = ("file://", "local://")


@dataclass(frozen=True, slots=True)
class Url:
    """What ``Path`` cannot hold, since it makes one slash of two. Ends in no slash."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """The last part; the host or bucket where there is no other."""
        return self.text.rsplit("/", 1)[1]

    @property
    def scheme(self) -> str:
        return self.text.split(":", 1)[0].lower()


Place: TypeAlias = Path | Url


def is_url(text: str) -> bool:
    """Whether ``text`` names a place that is not on this file system."""
    return _SCHEME.match(text) is not None and not text.startswith(_LOCAL)


def place_of(text: str | Path) -> Place:
    """A URL (``s3://``, ``gs://``, ``http://`` and whatever else fsspec knows), or a local path."""
    if isinstance(text, Path):
        return text
    if is_url(text):
        return Url(text.rstrip("/"))
    for prefix in _LOCAL:
        text = text.removeprefix(prefix)
    return Path(text)


def name_of(place: Place) -> str:
    """What a source in ``place`` is called where nobody gave it a name."""
    return place.name if isinstance(place, Url) else place.resolve().name
