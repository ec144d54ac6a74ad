"""What a run could not read when it began.

A picture may be mended while a run is stopped, or a disk that failed for a moment may answer again.
The run must then go on with the pictures it began with, or their order is another one. So what
could not be read is written down once a survey has led to a training, and the same run believes it
when it is resumed; other runs, even those that share its scores, look for themselves.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path

from emu35.errors import DataError
from emu35.files import write_atomically
from emu35.vision.pictures.columns import Column

Reasons = dict[int, str]
"""Index of a picture in the listing -> why it could not be read."""


class Unread:
    """Of one listing, in ``folder / unread-KEY.json``: the identity of a column -> reasons."""

    def __init__(self, folder: Path, *, key: str) -> None:
        """
        Raises:
            DataError: the file is there and damaged.
        """
        self.path = folder / f"unread-{key}.json"
        self._found = dict[str, Reasons]()
        if not self.path.exists():
            return
        try:
            for identity, reasons in json.loads(self.path.read_bytes()).items():
                self._found[identity] = _ascending(
                    {int(index): str(why) for index, why in reasons.items()}
                )
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.path} cannot be read ({error}); delete it, and the pictures that it tells "
                "of are looked at again"
            ) from error

    def __len__(self) -> int:
        """Pictures."""
        return len({index for reasons in self._found.values() for index in reasons})

    def of(self, column: Column, *, span: slice) -> Reasons:
        """By place in ``span``."""
        reasons = self._found.get(column.identity, {})
        ascending = list(reasons)
        first, last = (bisect_left(ascending, index) for index in (span.start, span.stop))
        return {index - span.start: reasons[index] for index in ascending[first:last]}

    def write(self, found: Mapping[str, Mapping[int, str]]) -> None:
        """Remember ``found`` as well; nothing is written where there is nothing new.

        Raises:
            DataError: it cannot be written.
        """
        total = dict(self._found)
        for identity, reasons in found.items():
            if reasons:
                total[identity] = _ascending({**total.get(identity, {}), **reasons})
        if total == self._found:
            return
        self._found = total
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, content=json.dumps(total, indent=1).encode("ascii"))
        except OSError as error:
            raise DataError(
                f"cannot write {self.path}: {error.strerror or error}; free some space"
            ) from error


def _ascending(reasons: Reasons) -> Reasons:
    return dict(sorted(reasons.items()))
