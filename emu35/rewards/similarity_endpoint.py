"""``similarity_endpoint``: how well pictures match the prompt's words, by a server.

The protocol, which :mod:`emu35.rewards.similarity_server` speaks too::

    POST {base_url}/similarity
    {"model": "siglip", "pairs": [{"text": "a red cat", "image": "data:image/png;base64,..."}]}

    200 {"scores": [0.31]}

One score a pair, in order: a number in [``scale_low``, ``scale_high``], or {"unscored": "why"} for
a pair that cannot be judged. Anything else is a failed call.
"""

import math
from collections.abc import Sequence
from typing import Any

from emu35.config.reward_remote import SimilarityEndpointRewardConfig
from emu35.rewards.call import RewardFailed
from emu35.rewards.http import Endpoint, data_url
from emu35.rewards.sample import Cost, Range, Record, Sample, Score, Unscored

PATH = "similarity"
"""Behind the base of the address."""


class SimilarityEndpointReward:
    """The mean over an answer's pictures of the server's score against the prompt. The answer's own
    words do not count: a model could write what it drew. An answer without a picture has no score.

    Raises:
        ConfigError: httpx or the key is missing.
    """

    def __init__(self, config: SimilarityEndpointRewardConfig) -> None:
        self.range = Range(low=config.scale_low, high=config.scale_high)
        self.cost = Cost.network
        self._model = config.model
        self._endpoint = Endpoint(config)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """All samples in one call.

        Raises:
            RewardFailed: the server did not answer, or not as the protocol says.
        """
        pairs = [
            {"text": sample.prompt, "image": data_url(picture)}
            for sample in samples
            for picture in sample.pictures
        ]
        found = iter(self._asked(pairs) if pairs else [])
        return [_mean([next(found) for _ in sample.pictures]) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        """None: prompt and pictures are all it takes."""
        return []

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _asked(self, pairs: Sequence[Any]) -> list[Score]:
        body = {"model": self._model, "pairs": pairs} if self._model else {"pairs": pairs}
        reply: object = self._endpoint.post(PATH, body=body)
        scores: object = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != len(pairs):
            shown = f"{len(scores)} scores" if isinstance(scores, list) else "no scores"
            raise RewardFailed(f"the similarity server gave {shown} for {len(pairs)} pairs")
        return [self._read(score) for score in scores]

    def _read(self, score: object) -> Score:
        if isinstance(score, dict) and isinstance(score.get("unscored"), str):
            return Unscored(score["unscored"])
        number = None if isinstance(score, bool) else score
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise RewardFailed(f"the similarity server gave {str(score)[:80]!r} as a score")
        if not self.range.low <= number <= self.range.high:
            raise RewardFailed(
                f"the similarity server's score {number:g} lies outside its scale "
                f"[{self.range.low:g}, {self.range.high:g}]"
            )
        return float(number)


def _mean(scores: Sequence[Score]) -> Score:
    numbers = [score for score in scores if not isinstance(score, Unscored)]
    if not scores:
        return Unscored("the answer has no picture")
    if len(numbers) < len(scores):
        return next(score for score in scores if isinstance(score, Unscored))
    return sum(numbers) / len(numbers)
