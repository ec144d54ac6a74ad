"""Aspect-ratio buckets: which sizes there are, which picture has which, and what comes when.

A plan, not a queue. Pictures of one bucket form an endless sequence of their own, epoch after
epoch, each a permutation; every ``group`` of them in a row are a micro-batch (or several), and a
group that begins in one epoch and ends in the next belongs to the latter. How many groups an epoch
has is therefore a sum of divisions, and any sample of the run can be found without those before it.
Within an epoch the groups of all buckets are shuffled. Nothing is lost: what does not fill a group
is the beginning of the bucket's first group in the next epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RATIOS = (
    (1, 1),
    (4, 3),
    (3, 4),
    (3, 2),
    (2, 3),
    (16, 9),
    (9, 16),
    (21, 9),
    (9, 21),
)
"""Width to height."""

_GROUPS, _MEMBERS = 4, 5  # streams of the seed; 1 to 3 are those of cut.Draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """The size of its pictures, and of the pieces cut from them, in pixels."""

    width: int
    height: int
    crop_width: int
    crop_height: int


def make_buckets(*, resolution: int, factor: int, crop: int = 0) -> list[Bucket]:
    """Sizes of about ``resolution`` squared pixels, sides multiples of ``factor``, near
    :data:`RATIOS`; with ``crop``, pieces of about that squared. Ratios that the factor makes one
    size are one bucket.
    """
    buckets = dict[tuple[int, int], Bucket]()
    for ratio in RATIOS:
        width, height = _size(ratio, side=resolution, factor=factor)
        piece = _size(ratio, side=crop, factor=factor) if crop else (width, height)
        buckets.setdefault(
            (width, height),
            Bucket(
                width=width,
                height=height,
                crop_width=min(piece[0], width),
                crop_height=min(piece[1], height),
            ),
        )
    return list(buckets.values())


def _size(ratio: tuple[int, int], *, side: int, factor: int) -> tuple[int, int]:
    """(width, height): both roundings of both sides are tried, and the area counts twice as much as
    the ratio. Rounding each by itself makes small pictures half as large again as they should be.
    """
    if ratio[0] < ratio[1]:
        height, width = _size((ratio[1], ratio[0]), side=side, factor=factor)
        return width, height  # upright sizes mirror the others
    aspect = ratio[0] / ratio[1]
    exact = (side * aspect**0.5 / factor, side / aspect**0.5 / factor)
    choices = [[max(1, int(length)), int(length) + 1] for length in exact]

    def misfit(size: tuple[int, int]) -> float:
        columns, rows = size
        area = abs(np.log(columns * rows / (exact[0] * exact[1])))
        return float(2 * area + abs(np.log(columns / rows / aspect)))

    columns, rows = min(((c, r) for c in choices[0] for r in choices[1]), key=misfit)
    return columns * factor, rows * factor


def assign(sizes_N2: NDArray[np.int64], *, buckets: Sequence[Bucket]) -> NDArray[np.int64]:
    """The bucket of each picture of (width, height): that of the nearest aspect, by the logarithm;
    the earlier of two as near."""
    aspect_N = np.log(sizes_N2[:, 0] / sizes_N2[:, 1])
    aspect_K = np.log([bucket.width / bucket.height for bucket in buckets])
    nearest_N = np.zeros(len(sizes_N2), dtype=np.int64)
    distance_N = np.full(len(sizes_N2), np.inf)
    for number, aspect in enumerate(aspect_K):
        # Half a step of rounding must not decide between mirror images of a ratio.
        closer_N = np.abs(aspect_N - aspect) < distance_N - 1e-9
        nearest_N[closer_N] = number
        distance_N = np.where(closer_N, np.abs(aspect_N - aspect), distance_N)
    return nearest_N


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A sample: its bucket, and the place of its picture among that bucket's members."""

    bucket: int
    member: int


class BucketPlan:
    """Which picture each sample of a run is.

    Args:
        counts: pictures of each bucket.
        group: consecutive samples of one bucket, counted from sample 0.
    """

    def __init__(self, counts: Sequence[int], *, group: int, seed: int) -> None:
        assert group >= 1
        assert sum(counts) >= 1
        self._counts = tuple(counts)
        self._group = group
        self._seed = seed

    def groups_before(self, epoch: int) -> int:
        """Groups that are complete before ``epoch`` (from 0) begins."""
        return sum(epoch * count // self._group for count in self._counts)

    def place(self, sample: int) -> Place:
        """Of sample number ``sample``, from 0."""
        number, slot = divmod(sample, self._group)
        # All buckets together have no more groups than their pictures would fill, so this epoch or
        # a later one, at most one that lets every bucket complete a group.
        epoch = number * self._group // sum(self._counts)
        while self.groups_before(epoch + 1) <= number:
            epoch += 1
        bucket, order = _epoch_group(
            self._seed, epoch, self._counts, self._group, number - self.groups_before(epoch)
        )
        turn, step = divmod(order * self._group + slot, self._counts[bucket])
        members = _members(self._seed, bucket, turn, self._counts[bucket])
        return Place(bucket=bucket, member=int(members[step]))


def _epoch_group(
    seed: int, epoch: int, counts: tuple[int, ...], group: int, number: int
) -> tuple[int, int]:
    """(bucket, its how manieth group of the run) of group ``number`` of an epoch."""
    firsts = [epoch * count // group for count in counts]
    lasts = [(epoch + 1) * count // group for count in counts]
    ends = np.cumsum([last - first for first, last in zip(firsts, lasts, strict=True)])
    place = int(_shuffled(seed, epoch, int(ends[-1]))[number])
    bucket = int(np.searchsorted(ends, place, side="right"))
    before = int(ends[bucket - 1]) if bucket else 0
    return bucket, firsts[bucket] + place - before


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, groups: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, _GROUPS, epoch]).permutation(groups)


@lru_cache(maxsize=4 * len(RATIOS))
def _members(seed: int, bucket: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, _MEMBERS, bucket, turn]).permutation(count)
