"""One number for everything a run has read, by which two streams can be told apart.

Every piece of every sample is mixed with the place it has (number of the sample, position in its
row) by the finalizer of splitmix64, and the results are added up modulo 2^64. The sum depends
neither on how many samples are taken at once nor on ranks, and goes on from a state.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BITS = 64
_POSITION_BITS = 20
_ODD, _ODDER = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Codes = npt.NDArray[np.int64]


def stream_digest(codes: Codes, *, lengths: Sequence[int], first: int) -> int:
    """The digest of some samples, to be added to that of those before them.

    Args:
        codes: the pieces of all samples, one after the other; equal pieces have equal codes.
        lengths: how many of them each sample has.
        first: number of the first sample.
    """
    counts = np.array(lengths, dtype=np.int64)
    sample = np.repeat(np.arange(first, first + len(counts)), counts)
    position = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = _mix(((sample << _POSITION_BITS) + position).astype(np.uint64))
    return int(_mix(codes.astype(np.uint64) + place).sum(dtype=np.uint64))


def add_digests(one: int, other: int) -> int:
    """The digest of two stretches of a stream."""
    return (one + other) % 2**_BITS


def shown(digest: int) -> float:
    """A digest as a number of a log: its lower 53 bits, which a float holds exactly."""
    return float(digest % 2**53)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _ODD
    values = (values ^ (values >> np.uint64(27))) * _ODDER
    return values ^ (values >> np.uint64(31))
