"""A reward that one command scores with, which a failure ends."""

from dataclasses import dataclass

from emu35.errors import DataError
from emu35.rewards.call import checked, told
from emu35.rewards.sample import Record, Reward, Sample, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedReward:
    """A reward under the name that a user called it by."""

    name: str
    reward: Reward

    def problems(self, record: Record) -> list[str]:
        """What keeps answers to ``record`` from being scored, as far as it can be told
        beforehand."""
        return self.reward.problems(record)

    def score(self, sample: Sample) -> Score:
        """The score of one answer, in the reward's own range.

        Raises:
            DataError: the reward failed, or what it gave is no finite number.
        """
        try:
            (score,) = checked(self.reward.score([sample]), of=1)
        except Exception as error:
            raise DataError(
                f"reward {self.name} failed on {sample.where}: {told(error)}; mend it and run the "
                "same command again"
            ) from error
        return score
