"""How different the answers to one prompt still are.

Rewards rise when a policy finds the one picture that each prompt is paid best for. These figures
fall when it does, before anybody looks at pictures: how many of a group's pictures are distinct,
how many of their codes differ, and how many codes they use at all.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.integer]
"""The codes [H, W] of one picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiversitySums:
    """Sums over groups, which add up over ranks.

    Attributes:
        pictures, distinct: pictures of all groups, and those that differ from every earlier one
            in the same place of their group.
        compared: groups with at least two answers that have a picture.
        difference: over compared groups, the mean share of differing codes over pairs of answers.
        measured: groups with a picture.
        entropy: over measured groups, nats of the distribution of codes in the group's pictures.
    """

    pictures: float = 0.0
    distinct: float = 0.0
    compared: float = 0.0
    difference: float = 0.0
    measured: float = 0.0
    entropy: float = 0.0

    @classmethod
    def of(cls, groups: Iterable[Sequence[Sequence[Codes]]]) -> "DiversitySums":
        """Of the pictures of every answer of every group. Answers without one take no part: text
        is measured by the policy's entropy."""
        total = cls()
        for group in groups:
            total += _of_group([answer for answer in group if len(answer)])
        return total

    def __add__(self, other: "DiversitySums") -> "DiversitySums":
        return DiversitySums.from_numbers(
            [a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)]
        )

    def numbers(self) -> list[float]:
        """The sums in field order, to be added up over ranks."""
        return list(astuple(self))

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "DiversitySums":
        names = [each.name for each in fields(cls)]
        return cls(**dict(zip(names, numbers, strict=True)))

    def metrics(self) -> dict[str, float]:
        """``diversity/images`` (share of distinct pictures: 1 all differ), ``diversity/difference``
        (share of codes in which two answers differ) and ``diversity/code_entropy`` (nats); what
        nothing was seen of is left out."""
        metrics: dict[str, float] = {}
        if self.pictures:
            metrics["diversity/images"] = self.distinct / self.pictures
        if self.compared:
            metrics["diversity/difference"] = self.difference / self.compared
        if self.measured:
            metrics["diversity/code_entropy"] = self.entropy / self.measured
        return metrics


def _of_group(answers: Sequence[Sequence[Codes]]) -> DiversitySums:
    if not answers:
        return DiversitySums()
    # A story may well show the same scene twice; it is the answers that are to differ.
    seen = {
        (place, codes_HW.shape, codes_HW.astype(np.int64).tobytes())
        for answer in answers
        for place, codes_HW in enumerate(answer)
    }
    differences = [_difference(a, b) for a, b in combinations(answers, 2)]
    return DiversitySums(
        pictures=sum(map(len, answers)),
        distinct=len(seen),
        compared=float(bool(differences)),
        difference=math.fsum(differences) / max(len(differences), 1),
        measured=1.0,
        entropy=_entropy(answers),
    )


def _difference(a: Sequence[Codes], b: Sequence[Codes]) -> float:
    """The mean over places of the share of codes that differ; all of them where one answer has no
    such picture, or one of another size."""
    shares = [
        float(np.mean(x_HW != y_HW)) if x_HW.shape == y_HW.shape else 1.0
        for x_HW, y_HW in zip(a, b, strict=False)
    ]
    return (math.fsum(shares) + abs(len(a) - len(b))) / max(len(a), len(b))


def _entropy(answers: Sequence[Sequence[Codes]]) -> float:
    codes_N = np.concatenate([codes_HW.ravel() for answer in answers for codes_HW in answer])
    counts_K = np.unique(codes_N, return_counts=True)[1]
    share_K = counts_K / counts_K.sum()
    return float(-(share_K * np.log(share_K)).sum())
