"""How much of a codebook pictures use: which codes, how evenly, on which grids."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.shards import atomic_file
from emu35.errors import DataError

REPORT = "usage.json"
HISTOGRAM = "usage.npy"

_TOP = 16
"""Most frequent codes that the report names."""
_GRIDS = 5
"""Most frequent grids that the text names before it counts the rest."""


@dataclass(kw_only=True, slots=True)
class Usage:
    """Counts over pictures: of each code, int64 [K], and of each grid, ``ROWSxCOLUMNS``."""

    counts_K: npt.NDArray[np.int64]
    grids: Counter[str] = field(default_factory=Counter[str])

    @staticmethod
    def none(codebook_size: int) -> "Usage":
        """Of no picture yet."""
        return Usage(counts_K=np.zeros(codebook_size, np.int64))

    @property
    def pictures(self) -> int:
        return self.grids.total()

    @property
    def codes(self) -> int:
        """Codes of all pictures, each as often as it occurs."""
        return int(self.counts_K.sum())

    @property
    def used(self) -> int:
        """Codes that occur."""
        return int(np.count_nonzero(self.counts_K))

    @property
    def share(self) -> float:
        """Codes that occur, out of all."""
        return self.used / len(self.counts_K)

    @property
    def perplexity(self) -> float:
        """Effective number of codes: the exponential of the entropy of their frequencies; 0 of no
        picture."""
        found = self.counts_K[self.counts_K > 0] / max(self.codes, 1)
        return float(np.exp(-(found * np.log(found)).sum())) if len(found) else 0.0

    def add(self, codes_HW: npt.NDArray[np.integer[Any]]) -> None:
        """Count one picture."""
        found, counts = np.unique(codes_HW, return_counts=True)
        self.counts_K[found] += counts
        rows, columns = codes_HW.shape
        self.grids[f"{rows}x{columns}"] += 1

    def top(self, count: int = _TOP) -> list[tuple[int, int]]:
        """The most frequent codes and how often each occurs; of equally frequent ones the lowest
        first."""
        order = np.argsort(-self.counts_K, kind="stable")[: min(count, self.used)]
        return [(int(code), int(self.counts_K[code])) for code in order]

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pictures": self.pictures,
            "codes": self.codes,
            "codebook_size": len(self.counts_K),
            "used": self.used,
            "share": self.share,
            "perplexity": self.perplexity,
            "top": [{"code": code, "count": count} for code, count in self.top()],
            "grids": dict(sorted(self.grids.items(), key=lambda item: (-item[1], item[0]))),
            "histogram": HISTOGRAM,
        }

    def lines(self) -> list[str]:
        """A few lines to print."""
        size = len(self.counts_K)
        most = sorted(self.grids.items(), key=lambda item: (-item[1], item[0]))
        rest = len(most) - _GRIDS
        grids = ", ".join(f"{count} of {grid}" for grid, count in most[:_GRIDS])
        top = ", ".join(f"{code} ({count / self.codes:.2%})" for code, count in self.top(3))
        return [
            f"codebook: {self.used} of {size} codes used ({self.share:.1%}), perplexity "
            f"{self.perplexity:.1f}; most frequent: {top or 'none'}",
            f"grids: {grids}{f' and {rest} other sizes' if rest > 0 else ''}",
        ]

    def write_note(self, path: Path) -> None:
        """Leave the counts in a file, small where few codes occur."""
        (found,) = np.nonzero(self.counts_K)
        note = {
            "codes": found.tolist(),
            "counts": self.counts_K[found].tolist(),
            "grids": dict(sorted(self.grids.items())),
        }
        with atomic_file(path) as file:
            file.write(json.dumps(note).encode())

    def add_note(self, path: Path) -> None:
        """Add what :meth:`write_note` left.

        Raises:
            DataError: it is gone or damaged.
        """
        try:
            note: dict[str, Any] = json.loads(path.read_bytes())
            self.counts_K[note["codes"]] += np.asarray(note["counts"], np.int64)
            self.grids.update(note["grids"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path}, which counts the codes of an input, cannot be read ({error}); the codes "
                "themselves are whole. Start over with --replace to have them counted again"
            ) from error


def usage_of(notes: Iterable[Path], *, codebook_size: int) -> Usage:
    """The sum of what was noted.

    Raises:
        DataError: a note is gone or damaged.
    """
    usage = Usage.none(codebook_size)
    for path in notes:
        usage.add_note(path)
    return usage


def write_report(usage: Usage, *, folder: Path) -> None:
    """Write ``usage.json`` and the whole histogram, ``usage.npy``, int64 [K]; no other process may
    write there at the time."""
    for left in folder.glob(f".{HISTOGRAM}.*.tmp"):
        left.unlink()  # by a run that was killed
    with atomic_file(folder / HISTOGRAM) as file:
        np.save(file, usage.counts_K)
    with atomic_file(folder / REPORT) as file:
        file.write(json.dumps(usage.report(), indent=1).encode() + b"\n")
