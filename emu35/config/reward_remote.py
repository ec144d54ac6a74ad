"""Rewards behind a network: judges that speak the OpenAI protocol, and similarity servers."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from emu35.config.check import at_least
from emu35.config.reward import RewardConfig


class ReplyForm(StrEnum):
    """What a judge is to answer, and nothing else: ``json``, {"score": 7} (a ``reason`` may stand
    beside it), or ``line``, SCORE: 7."""

    json = "json"
    line = "line"


@dataclass(kw_only=True, slots=True)
class EndpointRewardConfig(RewardConfig):
    """Base of the rewards that ask a server at ``base_url``. ``api_key_env`` names the environment
    variable that holds its key; the key itself never enters a configuration.

    Its scores lie in [``scale_low``, ``scale_high``]; one that does not is a failed call, not a
    score to be clamped. ``low`` and ``high`` may take a part of that scale as the source range.
    """

    base_url: str = ""
    api_key_env: str | None = None
    scale_low: float = 1.0
    scale_high: float = 10.0
    concurrency: int = 8

    def problems(self, name: str) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from RewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        if not _is_address(self.base_url):
            yield (
                f"{where}.base_url={self.base_url!r} is no address; write http://HOST:PORT/v1 or "
                "https://..., without a question mark"
            )
        if self.scale_low >= self.scale_high:
            yield (
                f"{where}.scale_low={self.scale_low} must lie below scale_high={self.scale_high}; "
                "where less is better, turn round low and high instead"
            )
        for end in (self.low, self.high):
            if end is not None and not self.scale_low <= end <= self.scale_high:
                yield (
                    f"{where}: low and high must lie in the scale [{self.scale_low}, "
                    f"{self.scale_high}], not at {end}"
                )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.port is None or parts.port > 0
    except ValueError:
        return False
    plain = not parts.query and not parts.fragment and parts.username is None
    return known and plain and parts.scheme in ("http", "https") and bool(parts.hostname)


@dataclass(kw_only=True, slots=True)
class JudgeRewardConfig(EndpointRewardConfig):
    """A vision language model that is shown an answer's pictures and gives a number.

    ``prompt`` is the rubric; ``{prompt}``, ``{low}`` and ``{high}`` in it become what the answer
    was asked for and the ends of the scale. The form of the reply is asked for behind it.
    ``references``: whether the pictures of the question are shown too.
    """

    kind: str = "judge"
    model: str = ""
    prompt: str = (
        "A model was asked for a picture. You are shown what it drew.\n"
        "Request: {prompt}\n"
        "How well does the picture do what was requested? {low}: it has nothing to do with the "
        "request. {high}: everything requested is there, nothing is wrong or distorted, and "
        "nothing is added that the request rules out."
    )
    form: ReplyForm = ReplyForm.json
    max_tokens: int = 64
    references: bool = True

    def problems(self, name: str) -> Iterator[str]:
        yield from EndpointRewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        yield from at_least(where, 1, max_tokens=self.max_tokens)
        if not self.model:
            yield f"{where}.model is empty; name the model that the server has"
        if "{prompt}" not in self.prompt:
            yield f"{where}.prompt has no {{prompt}}; without it a judge cannot know what was asked"
        if self.batch_size != 1:
            yield f"{where}.batch_size={self.batch_size} must be 1: a judge sees one answer a call"


@dataclass(kw_only=True, slots=True)
class ConsistencyRewardConfig(JudgeRewardConfig):
    """A judge that is shown a whole narrative, texts and pictures in order, and gives one number
    for how well they belong together. An answer of fewer than two pictures has no score."""

    kind: str = "consistency"
    prompt: str = (
        "A model was asked for a sequence of texts and pictures. You are shown all of them in "
        "order.\n"
        "Request: {prompt}\n"
        "How consistent is the sequence? Consider whether persons, objects, places and style stay "
        "the same from picture to picture, whether each picture shows what the text around it "
        "says, and whether the order makes sense. {low}: the pictures have nothing in common. "
        "{high}: fully consistent."
    )


@dataclass(kw_only=True, slots=True)
class SimilarityEndpointRewardConfig(EndpointRewardConfig):
    """A server that compares a picture with the prompt's words, as CLIP and SigLIP do
    (:mod:`emu35.rewards.similarity_endpoint` has the protocol). ``model`` is sent along where it is
    not empty. Cosines use a small part of their scale; give ``low`` and ``high`` of the model at
    hand."""

    kind: str = "similarity_endpoint"
    model: str = ""
    scale_low: float = -1.0
    scale_high: float = 1.0
    batch_size: int = 8
