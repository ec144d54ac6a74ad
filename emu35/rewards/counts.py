"""What a pool of rewards did: events of every reward, and where the time went."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(kw_only=True, slots=True)
class RewardCounts:
    """Events of one reward.

    Attributes:
        calls: that ended or were given up.
        seconds: in calls, summed over those that ran at once.
        samples: that have an outcome, a score or none.
        retries: samples that were asked about again.
        timeouts: calls that took too long.
        failures: calls that failed otherwise.
        late: calls that ended after they had been given up; what they gave is not used.
        unscored: samples without a score.
        clamped: samples whose score lay outside the range.
    """

    calls: int = 0
    seconds: float = 0.0
    samples: int = 0
    retries: int = 0
    timeouts: int = 0
    failures: int = 0
    late: int = 0
    unscored: int = 0
    clamped: int = 0

    def since(self, earlier: "RewardCounts") -> "RewardCounts":
        """What came on top of ``earlier``."""
        return RewardCounts(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        )

    def plus(self, other: "RewardCounts") -> "RewardCounts":
        """Both together, as of two ranks."""
        return RewardCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolCounts:
    """A pool at one moment, or between two (:meth:`since`).

    Attributes:
        rewards: events by reward.
        elapsed_seconds: since the pool was made.
        busy_seconds: of them, while a sample waited for a reward, was being judged, or was about to
            be asked again.
        waited_seconds: of them, while whoever uses the pool stood still for it: for results, or
            for room.
    """

    rewards: Mapping[str, RewardCounts] = field(default_factory=dict[str, RewardCounts])
    elapsed_seconds: float = 0.0
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0

    @property
    def idle_seconds(self) -> float:
        """While there was nothing to judge."""
        return self.elapsed_seconds - self.busy_seconds

    @property
    def hidden_share(self) -> float | None:
        """The share of the time of scoring that was hidden behind other work: 1 - waited / busy;
        None where nothing was scored."""
        if self.busy_seconds <= 0:
            return None
        return min(max(1.0 - self.waited_seconds / self.busy_seconds, 0.0), 1.0)

    def since(self, earlier: "PoolCounts") -> "PoolCounts":
        """What happened after ``earlier``."""
        return PoolCounts(
            rewards={
                name: counts.since(earlier.rewards.get(name, RewardCounts()))
                for name, counts in self.rewards.items()
            },
            elapsed_seconds=self.elapsed_seconds - earlier.elapsed_seconds,
            busy_seconds=self.busy_seconds - earlier.busy_seconds,
            waited_seconds=self.waited_seconds - earlier.waited_seconds,
        )

    def plus(self, other: "PoolCounts") -> "PoolCounts":
        """Both together, as of two ranks; the hidden share is then that of their sums."""
        none = RewardCounts()
        names = dict.fromkeys([*self.rewards, *other.rewards])
        return PoolCounts(
            rewards={
                name: self.rewards.get(name, none).plus(other.rewards.get(name, none))
                for name in names
            },
            elapsed_seconds=self.elapsed_seconds + other.elapsed_seconds,
            busy_seconds=self.busy_seconds + other.busy_seconds,
            waited_seconds=self.waited_seconds + other.waited_seconds,
        )

    def metrics(self) -> dict[str, float]:
        """For the log: ``scoring/hidden_share`` and the seconds, and for every reward that did
        something its events as ``scoring/REWARD/EVENT``."""
        found: dict[str, float] = {
            "scoring/busy_seconds": self.busy_seconds,
            "scoring/waited_seconds": self.waited_seconds,
        }
        if self.hidden_share is not None:
            found["scoring/hidden_share"] = self.hidden_share
        for name, counts in self.rewards.items():
            if counts != RewardCounts():
                found |= {
                    f"scoring/{name}/{f.name}": getattr(counts, f.name) for f in fields(counts)
                }
        return found
