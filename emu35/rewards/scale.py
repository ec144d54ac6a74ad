"""Scores of different rewards on one scale, and their weighted mean.

Every reward speaks in a range of its own. Each is mapped linearly to [1, 10] (paper section 4.2.1),
so that weights mean the same for all and no badly scaled one dominates; what lies beyond the range
is clamped and counted.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from emu35.config.reward import RewardConfig
from emu35.errors import ConfigError
from emu35.rewards.sample import Range, Reward, Score, Unscored

SCALE = Range(low=1.0, high=10.0)
"""What the scores of all rewards are mapped to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the rewards say of one answer.

    Attributes:
        raw: scores by reward, in the reward's own range.
        mapped: the same in [1, 10].
        clamped: rewards whose score lay outside its range.
        unscored: reward -> why it has no score.
        total: the weighted mean of the trained rewards in [1, 10]; None where one of them is
            missing.
        lacking: the answer has fewer pictures than were asked for, and so the worst of all scores.
    """

    raw: Mapping[str, float] = field(default_factory=dict[str, float])
    mapped: Mapping[str, float] = field(default_factory=dict[str, float])
    clamped: frozenset[str] = frozenset()
    unscored: Mapping[str, str] = field(default_factory=dict[str, str])
    total: float | None = None
    lacking: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """A score in [1, 10], and whether it lay outside its range before."""

    value: float
    clamped: bool


def mapped(raw: float, *, source: Range) -> Mapped:
    """``raw`` of the range ``source``, which may run downwards, in [1, 10]."""
    share = (raw - source.low) / (source.high - source.low)
    inside = min(max(share, 0.0), 1.0)
    value = SCALE.low + inside * (SCALE.high - SCALE.low)
    return Mapped(value=value, clamped=inside != share)


def configured_range(config: RewardConfig) -> Range | None:
    """The range that a user gave, if any."""
    if config.low is None or config.high is None:
        return None
    return Range(low=config.low, high=config.high)


def source_ranges(
    rewards: Mapping[str, Reward], *, configs: Mapping[str, RewardConfig]
) -> dict[str, Range]:
    """The range of each reward: as configured, else as the reward declares it.

    Raises:
        ConfigError: naming every reward that has none.
    """
    ranges = {
        name: configured_range(configs[name]) or reward.range for name, reward in rewards.items()
    }
    problems = [
        f"stage.rewards.{name} has no range that could be mapped to [1, 10] (it is "
        f"[{found.low}, {found.high}]); give low and high"
        for name, found in ranges.items()
        if not math.isfinite(found.low) or not math.isfinite(found.high) or found.low == found.high
    ]
    if problems:
        raise ConfigError(problems)
    return ranges


def worst(
    rewards: Iterable[str], *, ranges: Mapping[str, Range], weights: Mapping[str, float]
) -> Scores:
    """The scores of an answer without the pictures that ``rewards`` would judge."""
    found = {name: ranges[name].low for name in rewards}
    return replace(combine(found, ranges=ranges, weights=weights), lacking=True)


def combine(
    scores: Mapping[str, Score], *, ranges: Mapping[str, Range], weights: Mapping[str, float]
) -> Scores:
    """Map ``scores`` and weigh those of the trained rewards, which ``weights`` names; the others
    are held out and do not reach the total."""
    raw = {name: score for name, score in scores.items() if not isinstance(score, Unscored)}
    found = {name: mapped(value, source=ranges[name]) for name, value in raw.items()}
    total = None
    if weights and all(name in found for name in weights):
        weighted = sum(weight * found[name].value for name, weight in weights.items())
        total = weighted / sum(weights.values())
    return Scores(
        raw=raw,
        mapped={name: item.value for name, item in found.items()},
        clamped=frozenset(name for name, item in found.items() if item.clamped),
        unscored={
            name: score.reason for name, score in scores.items() if isinstance(score, Unscored)
        },
        total=total,
    )
