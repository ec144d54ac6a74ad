"""Answers that cannot be trained on for want of a score: how many, why, and whether the run goes
on."""

from collections.abc import Collection
from dataclasses import dataclass, field

from emu35.config.grpo import Unscored
from emu35.errors import DataError
from emu35.rewards.scale import Scores


@dataclass(kw_only=True, slots=True)
class Missing:
    """Of ``answers`` those ``unscored`` have no total. ``rewards`` counts by trained reward whose
    score is missing, and ``reasons`` has one reason of each. Held-out rewards do not count: nothing
    is trained on them. Neither do answers that have no other ones."""

    answers: int = 0
    unscored: int = 0
    rewards: dict[str, int] = field(default_factory=dict[str, int])
    reasons: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, scores: Scores, *, trained: Collection[str]) -> None:
        """Count one answer, which the rewards ``trained`` judge."""
        if not trained:
            return
        self.answers += 1
        self.unscored += scores.total is None
        for name, reason in scores.unscored.items():
            if name in trained:
                self.rewards[name] = self.rewards.get(name, 0) + 1
                self.reasons.setdefault(name, reason)

    def plus(self, other: "Missing") -> "Missing":
        """Both together: parts of a batch, or ranks."""
        rewards = dict(self.rewards)
        for name, count in other.rewards.items():
            rewards[name] = rewards.get(name, 0) + count
        return Missing(
            answers=self.answers + other.answers,
            unscored=self.unscored + other.unscored,
            rewards=rewards,
            reasons={**other.reasons, **self.reasons},
        )

    @property
    def share(self) -> float:
        """Of all answers those without a total."""
        return self.unscored / self.answers if self.answers else 0.0

    def __str__(self) -> str:
        whose = "; ".join(
            f"{name} failed at {count}, as in: {self.reasons[name]}"
            for name, count in self.rewards.items()
        )
        return f"{self.unscored} of {self.answers} answers have no score ({whose})"

    def check(self, *, policy: Unscored, most: float) -> None:
        """Whether training may go on without them: ``stage.unscored`` and, for the share that may
        be left out, ``stage.max_unscored``.

        Raises:
            DataError: it may not.
        """
        if not self.unscored:
            return
        if policy is Unscored.stop:
            raise DataError(
                f"{self}, and stage.unscored=stop; mend the reward and run the same command again, "
                "or leave such answers out with stage.unscored=drop"
            )
        if self.share > most:
            raise DataError(
                f"{self}, a share of {self.share:.2f} above stage.max_unscored={most:g}; mend the "
                "reward and run the same command again, or allow more"
            )
